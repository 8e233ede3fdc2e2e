//! Tensor names: which place of the base each one means.
//!
//! PEFT writes `base_model.model.<module path>.lora_A.weight`. Wrappers add segments before `layers` (multimodal
//! models, `torch.compile`, FSDP), some tools drop the prefix, and some leave the adapter name `default` in.

use crate::base::{MODULES, PARENTS};
use crate::error::Feature;
use crate::report::Matrix;

/// Segments that may stand before `layers.N`. None of them says *which* decoder, so that names which differ in these
/// alone mean the same place; a vision tower's names have others and are refused.
const WRAPPERS: [&str; 7] =
    ["base_model", "model", "language_model", "text_model", "module", "_orig_mod", "_fsdp_wrapped_module"];

/// What a tensor's name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Meaning<'a> {
    /// A factor of a module. `path` is the module's name in the model that the adapter was trained on.
    Factor { layer: u64, module: usize, matrix: Matrix, path: &'a str },
    /// Not a weight that the adapter changes.
    Ignorable { reason: &'static str },
    /// Known, and refused.
    Unsupported(Feature),
    /// Unknown, and refused.
    Unknown { reason: &'static str },
}

/// Reads a tensor's name.
pub(crate) fn read(name: &str) -> Meaning<'_> {
    let Some((module_path, matrix)) = split_factor(name) else { return read_other(name) };
    let path = module_path.strip_prefix("base_model.model.").unwrap_or(module_path);
    match place(module_path) {
        Ok((layer, module)) => Meaning::Factor { layer, module, matrix, path },
        Err(_) if is_vocabulary_sized(module_path) => Meaning::Unsupported(Feature::Embedding),
        Err(reason) => Meaning::Unknown { reason },
    }
}

/// The canonical name of a module: what PEFT sees when it loads the adapter on the plain base.
pub(crate) fn canonical_path(layer: u64, module: usize) -> String {
    format!("model.layers.{layer}.{}.{}", PARENTS[module], MODULES[module])
}

fn split_factor(name: &str) -> Option<(&str, Matrix)> {
    let name = name.strip_suffix(".weight")?;
    let name = name.strip_suffix(".default").unwrap_or(name);
    let a = name.strip_suffix(".lora_A").map(|path| (path, Matrix::A));
    a.or_else(|| name.strip_suffix(".lora_B").map(|path| (path, Matrix::B)))
}

/// Layer and module of `[wrappers.]layers.N.(self_attn|mlp).x_proj`.
fn place(module_path: &str) -> Result<(u64, usize), &'static str> {
    let mut segments = module_path.split('.');
    if segments.find(|segment| !WRAPPERS.contains(segment)) != Some("layers") {
        return Err("its path does not lead to a decoder layer (`layers.N`)");
    }
    let layer = segments.next().and_then(layer_number).ok_or("`layers` is not followed by a layer number")?;
    let (parent, leaf) = (segments.next().unwrap_or(""), segments.next().unwrap_or(""));
    if leaf == "experts" || parent == "block_sparse_moe" {
        return Err("it belongs to an expert, the base is dense");
    }
    if matches!(leaf, "qkv_proj" | "gate_up_proj") {
        return Err("it is fused; hint: split it into the base's own modules");
    }
    let module = (0..MODULES.len()).find(|&m| (PARENTS[m], MODULES[m]) == (parent, leaf));
    match module {
        Some(module) if segments.next().is_none() => Ok((layer, module)),
        _ => Err("its module is none of self_attn.{q,k,v,o}_proj and mlp.{gate,up,down}_proj"),
    }
}

/// Plain decimal: no sign and no leading zero, so that one layer has one spelling.
fn layer_number(segment: &str) -> Option<u64> {
    let plain = segment.bytes().all(|b| b.is_ascii_digit()) && (segment == "0" || !segment.starts_with('0'));
    if plain { segment.parse().ok() } else { None }
}

fn is_vocabulary_sized(module_path: &str) -> bool {
    matches!(module_path.rsplit('.').next(), Some("lm_head" | "embed_tokens" | "wte" | "embed_out"))
}

/// PEFT saves the base's own weights beside an adapter on the embedding or the output head.
fn is_base_of_vocabulary_sized(name: &str) -> bool {
    name.strip_suffix(".base_layer.weight").is_some_and(is_vocabulary_sized)
}

/// A tensor that is no LoRA factor.
fn read_other(name: &str) -> Meaning<'_> {
    let has = |segment: &str| name.split('.').any(|s| s == segment);
    if name.ends_with(".rotary_emb.inv_freq") {
        Meaning::Ignorable { reason: "rotary frequencies, which follow from the base's config" }
    } else if has("lora_magnitude_vector") {
        Meaning::Unsupported(Feature::Dora)
    } else if has("lora_embedding_A") || has("lora_embedding_B") || is_base_of_vocabulary_sized(name) {
        Meaning::Unsupported(Feature::Embedding)
    } else if has("token_adapter") || has("trainable_tokens_delta") {
        Meaning::Unsupported(Feature::TrainableTokens)
    } else if name.ends_with(".bias") && (has("lora_A") || has("lora_B")) {
        Meaning::Unsupported(Feature::LoraBias)
    } else if name.ends_with(".bias") {
        Meaning::Unsupported(Feature::Bias)
    } else if has("lora_A") || has("lora_B") {
        Meaning::Unknown { reason: "it is not spelled `.lora_A.weight` or `.lora_B.weight`" }
    } else if name.ends_with(".weight") {
        Meaning::Unsupported(Feature::ModulesToSave)
    } else {
        Meaning::Unknown { reason: "it is no factor of LoRA" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn factor(name: &str) -> Option<(u64, usize, Matrix, &str)> {
        match read(name) {
            Meaning::Factor { layer, module, matrix, path } => Some((layer, module, matrix, path)),
            _ => None,
        }
    }

    #[test]
    fn all_spellings_of_one_place_are_read() {
        for (prefix, path) in [
            ("base_model.model.", "model."),
            ("", "model."),
            ("base_model.model.", "model.language_model."),
            ("base_model.model.", "language_model.model."),
            ("base_model.model.", "_orig_mod.model."),
            ("base_model.model.", "model.model."),
            ("", ""),
        ] {
            for default in ["", ".default"] {
                let path = format!("{path}layers.12.mlp.up_proj");
                let name = format!("{prefix}{path}.lora_B{default}.weight");
                assert_eq!(factor(&name), Some((12, 5, Matrix::B, path.as_str())), "{name}");
            }
        }
    }

    #[test]
    fn what_is_no_factor_of_the_base_is_not_guessed_at() {
        let at = |module: &str| read_owned(&format!("base_model.model.{module}.lora_A.weight"));
        fn read_owned(name: &str) -> String {
            format!("{:?}", read(name))
        }
        assert!(at("model.layers.0.mlp.experts.3.up_proj").contains("expert"));
        assert!(at("model.layers.0.self_attn.qkv_proj").contains("fused"));
        assert!(at("model.layers.00.self_attn.q_proj").contains("layer number"));
        assert!(at("model.layers.+1.self_attn.q_proj").contains("layer number"));
        assert!(at("model.layers.0.mlp.q_proj").contains("none of"));
        assert!(at("model.layers.0.self_attn.q_proj.q_proj").contains("none of"));
        assert!(at("vision_tower.layers.0.self_attn.q_proj").contains("lead to a decoder"));
        assert!(at("model.encoder.layers.0.self_attn.q_proj").contains("lead to a decoder"));
        assert_eq!(at("lm_head"), "Unsupported(Embedding)");
        let second_adapter = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.other.weight";
        assert!(read_owned(second_adapter).contains("not spelled"));
    }
}
