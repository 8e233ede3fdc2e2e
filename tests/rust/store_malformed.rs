//! Checkpoints that must be refused: each with the code and the words that its message must have.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::fs;

use slora_store::{BaseSpec, Dtype, MODULES};

mod processor_time;
mod store_fixture;
use store_fixture::*;

#[test]
fn the_fixture_itself_is_accepted() {
    refusal(&Checkpoint::new(r#""r":8"#, &good_pair()), &tiny_base()).unwrap();
}

#[test]
fn configs_that_are_refused() {
    // The inside of the object, the code, what the message names.
    let table: &[(&str, &str, &[&str])] = &[
        (r#""use_dora":true"#, "unsupported_dora", &["use_dora", "true"]),
        (r#""lora_bias":true"#, "unsupported_lora_bias", &["lora_bias"]),
        ("\"modules_to_save\":[\n  \"lm_head\"\n]", "unsupported_modules_to_save", &["[\"lm_head\"]", "hint"]),
        (r#""init_lora_weights":"pissa_niter_16""#, "unsupported_init", &["pissa_niter_16", "hint"]),
        (r#""init_lora_weights":"loftq","loftq_config":{"loftq_bits":4}"#, "unsupported_init", &["loftq"]),
        (r#""init_lora_weights":"tomorrow""#, "unsupported_init", &["tomorrow"]),
        (r#""init_lora_weights":1"#, "bad_config_value", &["init_lora_weights", "a name"]),
        (r#""trainable_token_indices":[1,2]"#, "unsupported_trainable_tokens", &["[1,2]"]),
        (r#""trainable_token_indices":{"embed_tokens":[1]}"#, "unsupported_trainable_tokens", &["embed_tokens"]),
        (r#""target_parameters":["experts.w"]"#, "unsupported_target_parameters", &["experts.w"]),
        (r#""layer_replication":[[0,2],[1,3]]"#, "unsupported_layer_replication", &["layer_replication"]),
        (r#""alora_invocation_tokens":[3]"#, "unsupported_alora", &["alora_invocation_tokens"]),
        (r#""use_qalora":true"#, "unsupported_qalora", &["use_qalora"]),
        (r#""use_bdlora":{"nblocks":2}"#, "unsupported_bdlora", &["nblocks"]),
        (r#""arrow_config":{"top_k":2}"#, "unsupported_arrow", &["arrow_config"]),
        (r#""kasa_config":{"beta":1}"#, "unsupported_kasa", &["kasa_config"]),
        (r#""monteclora_config":{"n":1}"#, "unsupported_monteclora", &["monteclora_config"]),
        (r#""velora_config":{"n":1}"#, "unsupported_velora", &["velora_config"]),
        (r#""corda_config":{"n":1}"#, "unsupported_corda", &["corda_config", "hint"]),
        (r#""eva_config":{"rho":2.0}"#, "unsupported_eva", &["eva_config"]),
        (r#""lora_ga_config":{"n":1}"#, "unsupported_lora_ga", &["lora_ga_config"]),
        (r#""ensure_weight_tying":true"#, "unsupported_weight_tying", &["ensure_weight_tying"]),
        (r#""use_next_lora":true"#, "unknown_config_key", &["use_next_lora", "true"]),
        (r#""new_number":0.5"#, "unknown_config_key", &["new_number", "0.5"]),
        (r#""r":0"#, "rank_zero", &["`r`", "0"]),
        (r#""r":-8"#, "bad_config_value", &["`r`", "-8", "positive integer"]),
        (r#""r":8.5"#, "bad_config_value", &["8.5"]),
        (r#""r":"8""#, "bad_config_value", &["\"8\""]),
        (r#""r":99999999999"#, "bad_config_value", &["99999999999"]),
        (r#""r":null"#, "bad_config_value", &["`r`", "null"]),
        (r#""lora_alpha":null"#, "bad_config_value", &["lora_alpha", "null"]),
        (r#""r":16"#, "contradictory_rank", &[A, "rank 8", "16", "`r`"]),
        (r#""lora_alpha":0"#, "bad_config_value", &["lora_alpha", "0", "positive"]),
        (r#""lora_alpha":-1.5"#, "bad_config_value", &["-1.5"]),
        (r#""lora_alpha":1e999"#, "bad_config_value", &["1e999"]),
        (r#""lora_alpha":1e300"#, "bad_scale", &[A, "1e300", "rank 8"]),
        (r#""lora_alpha":1e-300"#, "bad_scale", &["1e-300"]),
        (r#""lora_alpha":NaN"#, "bad_config", &["line 1"]),
        (r#""use_rslora":"yes""#, "bad_config_value", &["use_rslora", "yes"]),
        (r#""bias":"some""#, "bad_config_value", &["bias", "some", "lora_only"]),
        (r#""target_modules":7"#, "bad_config_value", &["target_modules", "7"]),
        (r#""r":8,"r":8"#, "duplicate_key", &["adapter_config.json", "`r`"]),
        (r#""rank_pattern":{"q_proj":8,"q_proj":4}"#, "duplicate_key", &["q_proj"]),
        (r#""rank_pattern":[8]"#, "bad_config_value", &["rank_pattern", "[8]"]),
        (r#""rank_pattern":{"q_proj":0}"#, "rank_zero", &["rank_pattern", "q_proj"]),
        (r#""rank_pattern":{"q_proj":4}"#, "contradictory_rank", &[A, "rank 8", "4", "rank_pattern", "q_proj"]),
        (r#""rank_pattern":{"(?=q)q_proj":8}"#, "bad_pattern", &["rank_pattern", "(?=q)", "look-around"]),
        (r#""rank_pattern":{"(q_proj":8}"#, "bad_pattern", &["(q_proj"]),
        (r#""alpha_pattern":{"(.)\\1":8}"#, "bad_pattern", &["alpha_pattern", "linear-time"]),
        (r#""alpha_pattern":{"((a{99}){99}){99}":8}"#, "bad_pattern", &["compiles to more than"]),
        (r#""alpha_pattern":{".*+q_proj":8}"#, "bad_pattern", &["possessive"]),
        (r#""alpha_pattern":{"[a&&b]":8}"#, "bad_pattern", &["class"]),
        (r#""alpha_pattern":{"q_proj":-8}"#, "bad_config_value", &["alpha_pattern", "-8"]),
        (r#""alpha_pattern":{"q_proj":null}"#, "bad_config_value", &["alpha_pattern", "null"]),
    ];
    for (config, code, words) in table {
        println!("{config}");
        expect(refusal(&Checkpoint::new(config, &good_pair()), &tiny_base()), code, words);
    }
}

#[test]
fn config_files_that_are_refused() {
    let deep = format!(r#"{{"peft_type":"LORA","x":{}}}"#, "[".repeat(100_000));
    let many_keys = (0..5000).map(|i| format!("\"m{i}\":8")).collect::<Vec<_>>().join(",");
    let many_expressions = (0..65).map(|i| format!("\"m{i}.*\":8")).collect::<Vec<_>>().join(",");
    let long = format!(r#"{{"peft_type":"LORA","rank_pattern":{{"{}*":8}}}}"#, "x".repeat(1024));
    let table: &[(&str, &str, &[&str])] = &[
        ("", "bad_config", &["EOF"]),
        ("[]", "bad_config", &["object"]),
        ("null", "bad_config", &["object"]),
        ("\"LORA\"", "bad_config", &["object"]),
        (r#"{"peft_type":"LORA""#, "bad_config", &["EOF"]),
        (r#"{"peft_type":"LORA"} x"#, "bad_config", &["trailing"]),
        ("\u{feff}{}", "bad_config", &["expected"]),
        (&deep, "bad_config", &["expected value"]),
        ("{}", "not_lora", &["peft_type", "missing"]),
        (r#"{"peft_type":null}"#, "not_lora", &["null"]),
        (r#"{"peft_type":"LOHA"}"#, "not_lora", &["LOHA"]),
        (r#"{"peft_type":"\u001b[31m"}"#, "not_lora", &["peft_type"]),
        (&format!(r#"{{"peft_type":"LORA","rank_pattern":{{{many_keys}}}}}"#), "too_many_patterns", &["5000", "4096"]),
        (&format!(r#"{{"peft_type":"LORA","rank_pattern":{{{many_expressions}}}}}"#), "too_many_patterns", &["64"]),
        (&long, "bad_pattern", &["1025", "1024"]),
    ];
    for (config, code, words) in table {
        println!("{}", &config.chars().take(60).collect::<String>());
        let checkpoint = Checkpoint::new("", &good_pair());
        checkpoint.write_config(config);
        expect(refusal(&checkpoint, &tiny_base()), code, words);
    }
    let checkpoint = Checkpoint::new("", &good_pair());
    checkpoint.write_config(&" ".repeat((1 << 20) + 1));
    expect(refusal(&checkpoint, &tiny_base()), "config_too_large", &["1048577", "1048576"]);
}

#[test]
fn tensors_that_are_refused() {
    let extra = |name: &str, shape: &[u32]| {
        let mut tensors = good_pair();
        tensors.push(RawTensor::zeros(name, shape));
        tensors
    };
    let replaced = |index: usize, tensor: RawTensor| {
        let mut tensors = good_pair();
        tensors[index] = tensor;
        tensors
    };
    let module = "base_model.model.model.layers.0.self_attn.q_proj";
    let ranks = |a: u32, b: u32| vec![RawTensor::zeros(A, &[a, 24]), RawTensor::zeros(B, &[20, b])];
    let dtype = |dtype: &str, bytes: usize| {
        replaced(
            0,
            RawTensor { name: A.into(), dtype: dtype.into(), shape: vec![8, 24], data: vec![0; 8 * 24 * bytes] },
        )
    };
    let value = |index: usize, value: f32| {
        let mut tensors = good_pair();
        tensors[1].data[index * 4..][..4].copy_from_slice(&value.to_le_bytes());
        tensors
    };
    let table: Vec<(Vec<RawTensor>, &str, &[&str])> = vec![
        (vec![], "nothing_mapped", &["0"]),
        (vec![RawTensor::zeros("model.rotary_emb.inv_freq", &[4])], "nothing_mapped", &["1"]),
        (good_pair()[..1].to_vec(), "missing_pair", &[A, "lora_B"]),
        (good_pair()[1..].to_vec(), "missing_pair", &[B, "lora_A"]),
        (ranks(0, 0), "rank_zero", &[A]),
        (ranks(8, 4), "rank_mismatch", &[B, "4", "8"]),
        (ranks(8, 0), "rank_mismatch", &[B]),
        (ranks(4, 4), "contradictory_rank", &[A, "rank 4", "8"]),
        (replaced(0, RawTensor::zeros(A, &[24, 8])), "wrong_shape", &[A, "[24, 8]", "[rank, 24]", "another base"]),
        (replaced(1, RawTensor::zeros(B, &[8, 20])), "wrong_shape", &[B, "[20, rank]"]),
        (replaced(0, RawTensor::zeros(A, &[8, 32])), "wrong_shape", &["[8, 32]"]),
        (replaced(1, RawTensor::zeros(B, &[24, 8])), "wrong_shape", &["[24, 8]"]),
        (replaced(0, RawTensor::zeros(A, &[8 * 24])), "wrong_shape", &["[192]"]),
        (replaced(1, RawTensor::zeros(B, &[1, 20, 8])), "wrong_shape", &["[1, 20, 8]"]),
        (replaced(0, RawTensor::zeros(A, &[])), "wrong_shape", &["[]"]),
        (extra("model.layers.0.self_attn.q_proj.lora_A.weight", &[8, 24]), "duplicate_module", &[A]),
        (extra(&format!("{module}.lora_A.default.weight"), &[8, 24]), "duplicate_module", &["default"]),
        (
            extra("base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight", &[8, 24]),
            "layer_out_of_range",
            &["layer 3", "3 layers"],
        ),
        (
            extra("model.layers.18446744073709551616.mlp.up_proj.lora_A.weight", &[8, 24]),
            "unknown_tensor",
            &["layer number"],
        ),
        (extra("model.layers.-1.mlp.up_proj.lora_A.weight", &[8, 24]), "unknown_tensor", &["layer number"]),
        (extra("model.layers.01.mlp.up_proj.lora_A.weight", &[8, 24]), "unknown_tensor", &["layer number"]),
        (extra("model.layers.0.mlp.experts.0.up_proj.lora_A.weight", &[8, 24]), "unknown_tensor", &["expert"]),
        (extra("model.layers.0.mlp.gate_up_proj.lora_A.weight", &[8, 24]), "unknown_tensor", &["fused"]),
        (
            extra("model.vision_tower.layers.0.self_attn.q_proj.lora_A.weight", &[8, 24]),
            "unknown_tensor",
            &["vision_tower"],
        ),
        (extra(&format!("{module}.lora_A.other.weight"), &[8, 24]), "unknown_tensor", &["other"]),
        (extra("", &[1]), "unknown_tensor", &["``"]),
        (extra("\u{1b}[2J\0", &[1]), "unknown_tensor", &["\\u{1b}[2J\\u{0}"]),
        (extra(&"x".repeat(100_000), &[1]), "unknown_tensor", &["xxx…"]),
        (extra(&format!("{module}.lora_magnitude_vector"), &[20]), "unsupported_dora", &["lora_magnitude_vector"]),
        (extra(&format!("{module}.lora_B.bias"), &[20]), "unsupported_lora_bias", &["lora_B.bias"]),
        (extra(&format!("{module}.bias"), &[20]), "unsupported_bias", &["q_proj.bias"]),
        (
            extra("base_model.model.model.embed_tokens.lora_embedding_A", &[8, 64]),
            "unsupported_embedding",
            &["lora_embedding_A"],
        ),
        (extra("base_model.model.lm_head.lora_A.weight", &[8, 24]), "unsupported_embedding", &["lm_head"]),
        (extra("base_model.model.lm_head.base_layer.weight", &[64, 24]), "unsupported_embedding", &["base_layer"]),
        (extra("base_model.model.lm_head.weight", &[64, 24]), "unsupported_modules_to_save", &["lm_head.weight"]),
        (extra(&format!("{module}.base_layer.weight"), &[20, 24]), "unsupported_modules_to_save", &["base_layer"]),
        (
            extra("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", &[2, 24]),
            "unsupported_trainable_tokens",
            &["trainable_tokens_delta"],
        ),
        (dtype("F64", 8), "unsupported_dtype", &[A, "F64"]),
        (dtype("I8", 1), "unsupported_dtype", &["I8"]),
        (dtype("F8_E4M3", 1), "unsupported_dtype", &["F8_E4M3"]),
        (dtype("f32", 4), "unsupported_dtype", &["f32"]),
        (value(9, f32::NAN), "nan", &[B, "NaN", "[1, 1]"]),
        (value(159, f32::INFINITY), "infinite", &[B, "inf", "[19, 7]"]),
        (value(0, f32::NEG_INFINITY), "infinite", &["-inf", "[0, 0]"]),
    ];
    for (tensors, code, words) in table {
        println!("{code} {words:?}");
        expect(refusal(&Checkpoint::new(r#""r":8"#, &tensors), &tiny_base()), code, words);
    }
}

#[test]
fn values_that_overflow_the_base_dtype_are_refused() {
    for (dtype, value, name) in [(Dtype::F16, 65520.0, "f16"), (Dtype::Bf16, 3.4e38, "bf16")] {
        let mut tensors = good_pair();
        tensors[0].data[4..8].copy_from_slice(&f32::to_le_bytes(value));
        let base = BaseSpec { dtype, ..tiny_base() };
        expect(refusal(&Checkpoint::new("", &tensors), &base), "overflow", &[A, "[0, 1]", name]);
    }
    let mut tensors = good_pair();
    tensors[0] = RawTensor::new(A, Dtype::Bf16, &[8, 24], &[1e5; 8 * 24]);
    let base = BaseSpec { dtype: Dtype::F16, ..tiny_base() };
    expect(refusal(&Checkpoint::new("", &tensors), &base), "overflow", &[A, "[0, 0]"]);
}

#[test]
fn headers_that_are_refused() {
    let (good, data) = header_of(&good_pair());
    let entry = |shape: &str, begin: u64, end: u64| {
        format!(r#"{{"{A}":{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}}}"#)
    };
    let two = |first: (u64, u64), second: (u64, u64)| {
        let one = |name, (begin, end): (u64, u64)| {
            format!(r#""{name}":{{"dtype":"F32","shape":[{}],"data_offsets":[{begin},{end}]}}"#, (end - begin) / 4)
        };
        format!("{{{},{}}}", one("x", first), one("y", second))
    };
    let many = (0..(1 << 16) + 1).map(|i| format!(r#""{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#));
    let many = format!("{{{}}}", many.collect::<Vec<_>>().join(","));
    let huge_rank = format!("[{}]", ["1"; 9].join(","));
    let table: Vec<(String, &str, &[&str])> = vec![
        (good.replace("lora_B", "lora_A"), "duplicate_key", &[A, "safetensors"]),
        (good.replace(r#""shape":[8, 24]"#, r#""shape":[8, 23]"#), "wrong_tensor_bytes", &[A, "[8, 23]", "736", "768"]),
        (entry("[4294967296, 4294967296]", 0, 0), "shape_overflow", &[A, "4294967296"]),
        (entry("[4611686018427387903, 1]", 0, 18446744073709551612), "truncated", &["18446744073709551615"]),
        (entry("[2]", 8, 0), "reversed_offsets", &["0", "8"]),
        (entry("[1]", 4, 8), "hole", &["0", "4", A]),
        (two((0, 4), (8, 12)), "hole", &["4", "8", "`y`"]),
        (two((0, 8), (4, 12)), "overlapping_tensors", &["`x`", "`y`", "4", "8"]),
        (two((0, 8), (0, 8)), "overlapping_tensors", &["`x`", "`y`"]),
        (entry("[-1]", 0, 4), "bad_header", &["-1"]),
        (entry("[1.0]", 0, 4), "bad_header", &["1.0"]),
        (entry("1", 0, 4), "bad_header", &["sequence"]),
        (entry(&huge_rank, 0, 4), "bad_header", &["9", "8"]),
        (entry("[18446744073709551616]", 0, 4), "bad_header", &["expected u64"]),
        (entry("[1]", 0, 4).replace("dtype", "type"), "bad_header", &["type"]),
        (entry("[1]", 0, 4).replace(r#""shape""#, r#""dtype":"F32","shape""#), "bad_header", &["duplicate"]),
        (entry("[1]", 0, 4).replace("[0,4]", "[0,4,8]"), "bad_header", &["line 1"]),
        (entry("[1]", 0, 4).replace("[0,4]", "[0]"), "bad_header", &["line 1"]),
        (r#"{"__metadata__":{"format":1}}"#.into(), "bad_header", &["string"]),
        (entry("[1]", 0, 4).replace("dtype", &"\\u001bx".repeat(1000)), "bad_header", &["\\u{1b}x", "…"]),
        (r#"{"__metadata__":7}"#.into(), "bad_header", &["map"]),
        ("{".into(), "bad_header", &["EOF"]),
        ("[]".into(), "bad_header", &["{"]),
        (" {}".into(), "bad_header", &["{"]),
        ("".into(), "bad_header", &["{"]),
        (format!("{{\"x\":{}", "[".repeat(1000)), "bad_header", &["line 1"]),
        (many, "too_many_tensors", &["65536"]),
    ];
    for (header, code, words) in table {
        println!("{code} {words:?}");
        let checkpoint = Checkpoint::new("", &good_pair());
        checkpoint.write_weights(&safetensors(&header, &data));
        expect(refusal(&checkpoint, &tiny_base()), code, words);
    }
    let checkpoint = Checkpoint::new("", &good_pair());
    checkpoint.write_weights(&[&7u64.to_le_bytes(), b"{\"\xff\":1}".as_slice()].concat());
    expect(refusal(&checkpoint, &tiny_base()), "bad_header", &["line 1"]);
}

#[test]
fn a_file_cut_at_any_byte_is_refused() {
    let checkpoint = Checkpoint::new("", &good_pair());
    let whole = fs::read(checkpoint.weights_path()).unwrap();
    for len in 0..whole.len() {
        checkpoint.write_weights(&whole[..len]);
        expect(refusal(&checkpoint, &tiny_base()), "truncated", &[&format!("has {len} bytes"), "needs"]);
    }
    checkpoint.write_weights(&[whole.as_slice(), &[0]].concat());
    expect(refusal(&checkpoint, &tiny_base()), "trailing_bytes", &[&whole.len().to_string()]);
    for bytes in [(8 << 20) + 1, u64::MAX] {
        checkpoint.write_weights(&[&bytes.to_le_bytes(), &whole[8..]].concat());
        expect(refusal(&checkpoint, &tiny_base()), "header_too_large", &[&bytes.to_string(), "8388608"]);
    }
}

#[test]
fn bases_and_pools_that_cannot_take_the_adapter() {
    let checkpoint = Checkpoint::new("", &good_pair());
    let table: Vec<(BaseSpec, &str, &[&str])> = vec![
        (BaseSpec { page_bytes: 64, ..tiny_base() }, "row_too_long", &["q_proj", "96", "64", "hint"]),
        (BaseSpec { max_adapter_pages: 2, ..tiny_base() }, "too_many_pages", &["3", "2", "hint"]),
        (BaseSpec { max_rank: 1, ..tiny_base() }, "rank_too_large", &["q_proj", "layer 0", "8", "1", "hint"]),
        (BaseSpec { page_bytes: 100, ..tiny_base() }, "bad_base", &["100", "16"]),
        (BaseSpec { page_bytes: 0, ..tiny_base() }, "bad_base", &["page_bytes 0"]),
        (BaseSpec { num_layers: 0, ..tiny_base() }, "bad_base", &["num_layers 0"]),
        (BaseSpec { num_layers: 1 << 16, ..tiny_base() }, "bad_base", &["65536", "65535"]),
        (BaseSpec { max_adapter_pages: u32::MAX, ..tiny_base() }, "bad_base", &["max_adapter_pages"]),
        (BaseSpec { num_heads: u32::MAX, ..tiny_base() }, "bad_base", &["32 bits"]),
        (BaseSpec { tp_size: 2, ..tiny_base() }, "unsupported_tensor_parallel", &["2", "1"]),
    ];
    for (base, code, words) in table {
        println!("{code}");
        expect(refusal(&checkpoint, &base), code, words);
    }
}

#[test]
fn an_image_of_absurd_size_is_counted_and_not_allocated() {
    // A sparse file: its shapes are honest, and far too large.
    let rank = 1u64 << 30;
    let (a, b) = (rank * 24 * 4, 20 * rank * 4);
    let header = format!(
        r#"{{"{A}":{{"dtype":"F32","shape":[{rank},24],"data_offsets":[0,{a}]}},"{B}":{{"dtype":"F32","shape":[20,{rank}],"data_offsets":[{a},{}]}}}}"#,
        a + b
    );
    let checkpoint = Checkpoint::new(&format!(r#""r":{rank}"#), &[]);
    let start = safetensors(&header, &[]);
    checkpoint.write_weights(&start);
    let file = fs::OpenOptions::new().write(true).open(checkpoint.weights_path()).unwrap();
    file.set_len(start.len() as u64 + a + b).unwrap();
    expect(refusal(&checkpoint, &tiny_base()), "too_many_pages", &["393705", "4096"]);
}

#[test]
fn hostile_patterns_cost_a_bounded_time() {
    let base = BaseSpec { num_layers: 80, max_adapter_pages: 1 << 20, ..tiny_base() };
    let tensors: Vec<RawTensor> =
        (0..80).flat_map(|layer| MODULES.iter().flat_map(move |m| pair(&tiny_base(), layer, m, 1))).collect();
    let expression = |i: usize| format!(r#""(.*[a-z].*[0-9].*[_a-z].*){{{}}}(x|.*y{i}.*z)":1"#, 3 + i % 8);
    for keys in [
        (0..64).map(expression).collect::<Vec<_>>(),
        (0..4096).map(|i| format!(r#"".odel.layers.{i}.self_attn.x_proj":1"#)).collect(),
    ] {
        let config = format!(r#""r":1,"alpha_pattern":{{{}}}"#, keys.join(","));
        let checkpoint = Checkpoint::new(&config, &tensors);
        let start = processor_time::of_thread();
        let adapter = checkpoint.open(&base).unwrap();
        let took = processor_time::of_thread() - start;
        println!("{} keys, {} tensors: {took:?}", keys.len(), adapter.report().num_mapped);
        assert!(took.as_secs() < 2, "{took:?}");
    }
}
