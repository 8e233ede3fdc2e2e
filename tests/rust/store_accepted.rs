//! Checkpoints that must be accepted, and what the report says of them.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::fs;
use std::os::unix::fs::symlink;

use slora_store::{Adapter, Dtype, Fate, MODULE_WORDS, MODULES, Scaling};

mod store_fixture;
use store_fixture::*;

fn scale(adapter: &Adapter, layer: usize, module: &str) -> f32 {
    let module = MODULES.iter().position(|m| *m == module).unwrap();
    f32::from_bits(adapter.words()[(layer * MODULES.len() + module) * MODULE_WORDS + 1] as u32)
}

fn warnings(adapter: &Adapter) -> Vec<&str> {
    adapter.report().warnings.iter().map(|warning| warning.code).collect()
}

/// A config as PEFT 0.21 writes it, all defaults included.
const REAL_CONFIG: &str = r#"
  "alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping": {"unsloth_fixed": true},
  "base_model_name_or_path": "/elsewhere/tiny/base/", "bias": "none", "corda_config": null, "ensure_weight_tying": false,
  "eva_config": null, "exclude_modules": ["lm_head"], "fan_in_fan_out": true, "inference_mode": true,
  "init_lora_weights": true, "kasa_config": null, "layer_replication": null, "layers_pattern": null,
  "layers_to_transform": [0], "loftq_config": {}, "lora_alpha": 16.0, "lora_bias": false, "lora_dropout": 0.05,
  "lora_ga_config": null, "megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null,
  "monteclora_config": null, "peft_version": "0.21.2", "qalora_group_size": 16, "r": 8, "rank_pattern": {},
  "revision": null, "runtime_config": {"ephemeral_gpu_offload": false}, "target_modules": ["q_proj"],
  "target_parameters": [], "task_type": "CAUSAL_LM", "trainable_token_indices": null, "use_bdlora": null,
  "use_dora": false, "use_qalora": false, "use_rslora": false, "velora_config": null,
  "some_future_key": null, "another": [ ], "third": { }, "fourth": "", "fifth": false"#;

#[test]
fn a_config_with_every_default_is_accepted_in_silence() {
    let base = tiny_base();
    let checkpoint = Checkpoint::new(REAL_CONFIG, &pair(&base, 0, "q_proj", 8));
    let adapter = checkpoint.open(&base).unwrap();
    assert_eq!(warnings(&adapter), [""; 0]);
    assert_eq!(scale(&adapter, 0, "q_proj"), 2.0);
    let report = adapter.report();
    assert_eq!((report.num_mapped, report.num_ignored, report.num_parameters), (2, 0, 8 * 24 + 20 * 8));
    assert_eq!((report.min_rank, report.max_rank, report.scaling), (8, 8, Scaling::Lora));
    assert_eq!((report.targets(), &report.dtypes), (vec!["q_proj"], &vec![Dtype::F32]));
    assert_eq!(report.file_bytes, fs::metadata(checkpoint.weights_path()).unwrap().len());
    assert_eq!(adapter.bytes(), 8 * (96 + 80));
    let json: serde_json::Value = serde_json::from_str(&report.to_json()).unwrap();
    assert_eq!(json["tensors"][0]["fate"]["mapped"]["matrix"], "A");
    assert_eq!(json["modules"][0]["module"], "q_proj");
}

#[test]
fn the_defaults_of_peft_apply_when_keys_are_missing() {
    let adapter = Checkpoint::new("", &pair(&tiny_base(), 0, "q_proj", 8)).open(&tiny_base()).unwrap();
    assert_eq!(scale(&adapter, 0, "q_proj"), 1.0);
}

#[test]
fn scales_follow_alpha_rank_and_patterns() {
    let base = tiny_base();
    let tensors = [pair(&base, 0, "q_proj", 4), pair(&base, 1, "q_proj", 9), pair(&base, 1, "up_proj", 9)].concat();
    let open = |config: &str| Checkpoint::new(config, &tensors).open(&base).unwrap();

    let patterns =
        r#""r":9,"lora_alpha":18,"rank_pattern":{"layers.0.self_attn.q_proj":4},"alpha_pattern":{"q_proj":8}"#;
    let adapter = open(patterns);
    assert_eq!(
        [(0, "q_proj"), (1, "q_proj"), (1, "up_proj")].map(|(l, m)| scale(&adapter, l, m)),
        [2.0, 8.0 / 9.0, 2.0]
    );

    let adapter = open(&format!(r#"{patterns},"use_rslora":true"#));
    assert_eq!(
        [(0, "q_proj"), (1, "q_proj"), (1, "up_proj")].map(|(l, m)| scale(&adapter, l, m)),
        [4.0, 8.0 / 3.0, 6.0]
    );
    let line = &adapter.report().modules[0];
    assert_eq!((line.num_layers, line.min_rank, line.max_rank, line.max_scale), (2, 4, 9, 4.0));
}

#[test]
fn the_first_pattern_in_file_order_wins() {
    let base = tiny_base();
    for (patterns, expected, codes) in [
        (r#""q_proj":16,".*layers.0.*":4"#, 2.0, vec![]),
        (r#"".*layers.0.*":4,"q_proj":16"#, 0.5, vec![]),
        (r#""proj":16,"k_proj":24"#, 1.0, vec!["unused_pattern"]),
        (r#""model.layers.0.self_attn.q_proj":16"#, 2.0, vec![]),
        (r#""^model.layers.0.self_attn.q_proj":16"#, 2.0, vec![]),
        (r#""layers\\.0\\.self_attn\\.q_proj":16"#, 2.0, vec![]),
        (r#"".*q_proj|x":16"#, 2.0, vec![]),
    ] {
        let config = format!(r#""alpha_pattern":{{{patterns}}}"#);
        let adapter = Checkpoint::new(&config, &pair(&base, 0, "q_proj", 8)).open(&base).unwrap();
        assert_eq!(scale(&adapter, 0, "q_proj"), expected, "{patterns}");
        assert_eq!(warnings(&adapter), codes, "{patterns}");
    }
}

#[test]
fn patterns_are_matched_with_the_names_of_the_model_they_were_written_for() {
    let base = tiny_base();
    let mut tensors = pair(&base, 0, "q_proj", 8);
    for tensor in &mut tensors {
        tensor.name = tensor.name.replace("model.layers", "model.language_model.layers");
    }
    for key in ["model.language_model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.q_proj"] {
        let adapter = Checkpoint::new(&format!(r#""alpha_pattern":{{"{key}":16}}"#), &tensors).open(&base).unwrap();
        assert_eq!(scale(&adapter, 0, "q_proj"), 2.0, "{key}");
    }
}

#[test]
fn doubts_are_warnings() {
    let base = tiny_base();
    let tensors = pair(&base, 0, "q_proj", 8);
    for (config, codes) in [
        (r#""init_lora_weights":"gaussian""#, vec![]),
        (r#""init_lora_weights":false"#, vec![]),
        (r#""base_model_name_or_path":"someone/other""#, vec!["base_mismatch"]),
        (r#""base_model_name_or_path":"TINY/Base""#, vec![]),
        (r#""bias":"all""#, vec!["bias"]),
        (r#""target_modules":["q_proj","v_proj"]"#, vec!["unused_target"]),
        (r#""target_modules":["v_proj"]"#, vec!["untargeted_module", "unused_target"]),
        (r#""target_modules":[]"#, vec!["untargeted_module"]),
        (r#""target_modules":["self_attn.q_proj"]"#, vec![]),
        (r#""target_modules":"all-linear""#, vec![]),
        (r#""target_modules":".*\\.q_proj""#, vec![]),
        (r#""target_modules":"q_proj""#, vec!["untargeted_module"]),
        (r#""target_modules":"(?!.*vision).*q_proj""#, vec![]),
        (r#""rank_pattern":{"nowhere":3}"#, vec!["unused_pattern"]),
    ] {
        let adapter = Checkpoint::new(config, &tensors).open(&base).unwrap();
        assert_eq!(warnings(&adapter), codes, "{config}");
    }
}

#[test]
fn rotary_frequencies_are_ignored_and_said_to_be() {
    let base = tiny_base();
    let mut tensors = pair(&base, 0, "q_proj", 8).to_vec();
    tensors.push(RawTensor::zeros("base_model.model.model.layers.0.self_attn.rotary_emb.inv_freq", &[4]));
    let adapter = Checkpoint::new("", &tensors).open(&base).unwrap();
    assert_eq!((adapter.report().num_mapped, adapter.report().num_ignored), (2, 1));
    assert!(matches!(adapter.report().tensors[2].fate, Fate::Ignored { .. }));
}

#[test]
fn an_adapter_one_folder_down_is_found() {
    let base = tiny_base();
    let checkpoint = Checkpoint::new("", &pair(&base, 0, "q_proj", 8));
    let outer = Checkpoint::empty();
    fs::write(outer.path().join("README.md"), "x").unwrap();
    fs::create_dir(outer.path().join("runs")).unwrap();
    symlink(checkpoint.path(), outer.path().join("my_adapter")).unwrap();
    let adapter = outer.open(&base).unwrap();
    assert!(adapter.report().folder.ends_with("my_adapter"));
    pack(&adapter, &base).unwrap();
}

#[test]
fn links_are_followed_as_in_a_hub_cache() {
    let base = tiny_base();
    let blobs = Checkpoint::new("", &pair(&base, 0, "q_proj", 8));
    let snapshot = Checkpoint::empty();
    symlink(blobs.config_path(), snapshot.config_path()).unwrap();
    symlink(blobs.weights_path(), snapshot.weights_path()).unwrap();
    pack(&snapshot.open(&base).unwrap(), &base).unwrap();
}

#[test]
fn the_image_is_laid_out_in_the_documented_order() {
    let base = tiny_base();
    let tensors: Vec<RawTensor> = [2, 0]
        .iter()
        .flat_map(|&layer| MODULES.iter().rev().flat_map(move |m| pair(&tiny_base(), layer, m, 8)))
        .collect();
    let adapter = Checkpoint::new("", &tensors).open(&base).unwrap();
    assert_eq!(adapter.num_parts(), 2);
    let mut last = None;
    for layer in [0, 2] {
        for group in [&MODULES[..3], &MODULES[3..4], &MODULES[4..6], &MODULES[6..]] {
            for first_word in [2, 7] {
                for module in group {
                    let index = layer * 7 + MODULES.iter().position(|m| m == module).unwrap();
                    let words = &adapter.words()[index * MODULE_WORDS..][first_word..];
                    let place = Some((words[0], words[1]));
                    assert!(place > last, "layer {layer} {module} word {first_word}: {place:?} after {last:?}");
                    last = place;
                }
            }
        }
    }
}
