//! Tensor accounting: every tensor of the file ends in exactly one place, every factor has its partner, and ranks,
//! shapes, config and base agree. Anything else refuses the adapter.

use std::collections::HashSet;

use crate::base::MODULES;
use crate::config::{Config, Targets};
use crate::error::shown;
use crate::header::Tensor;
use crate::names::{self, Meaning};
use crate::pattern::compile_as_python;
use crate::report::{Fate, Warning};
use crate::{AdapterError, BaseSpec};

/// Items that a warning lists.
const MAX_SHOWN: usize = 5;

/// A module that has weights.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Module {
    pub(crate) layer: u16,
    /// Index into [`MODULES`].
    pub(crate) module: usize,
    pub(crate) rank: u32,
    pub(crate) scale: f32,
    /// Index of `lora_A` among the file's tensors.
    pub(crate) a: usize,
    /// Index of `lora_B` among the file's tensors.
    pub(crate) b: usize,
}

/// The accounting's result.
#[derive(Debug)]
pub(crate) struct Account {
    /// By layer, then module index.
    pub(crate) modules: Vec<Module>,
    /// Of every tensor.
    pub(crate) fates: Vec<Fate>,
    pub(crate) warnings: Vec<Warning>,
}

/// What a place of the base found in the file: tensor indices, and the module's path in the file's model.
#[derive(Debug, Clone, Default)]
struct Slot<'a> {
    factors: [Option<usize>; 2],
    path: &'a str,
}

/// Accounts for all tensors. Takes the config's patterns, since looking them up marks them as used.
pub(crate) fn account(tensors: &[Tensor], config: &mut Config, base: &BaseSpec) -> Result<Account, AdapterError> {
    let mut slots = vec![Slot::default(); base.num_layers as usize * MODULES.len()];
    let fates = (0..tensors.len()).map(|index| place(index, tensors, &mut slots, base));
    let fates = fates.collect::<Result<Vec<_>, _>>()?;

    let mut modules = Vec::new();
    let mut paths = Vec::new();
    for (index, slot) in slots.iter().enumerate() {
        let (layer, module) = (index / MODULES.len(), index % MODULES.len());
        let (a, b) = match slot.factors {
            [None, None] => continue,
            [Some(a), Some(b)] => (a, b),
            [Some(a), None] => return Err(missing_pair(&tensors[a], "lora_B")),
            [None, Some(b)] => return Err(missing_pair(&tensors[b], "lora_A")),
        };
        let rank = check_shapes(&tensors[a], &tensors[b], module, base)?;
        let scale = scale(&tensors[a].name, slot.path, (layer as u64, module), rank, config)?;
        modules.push(Module { layer: layer as u16, module, rank, scale, a, b });
        paths.push(slot.path);
    }
    if modules.is_empty() {
        return Err(AdapterError::NothingMapped { tensors: tensors.len() });
    }
    let mut warnings = unused_patterns(config);
    warnings.extend(compare_targets(&config.targets, &paths));
    Ok(Account { modules, fates, warnings })
}

/// Puts one tensor in its slot.
fn place<'a>(
    index: usize,
    tensors: &'a [Tensor],
    slots: &mut [Slot<'a>],
    base: &BaseSpec,
) -> Result<Fate, AdapterError> {
    let tensor = &tensors[index];
    let name = || tensor.name.clone();
    match names::read(&tensor.name) {
        Meaning::Factor { layer, module, matrix, path } => {
            if layer >= u64::from(base.num_layers) {
                return Err(AdapterError::LayerOutOfRange { name: name(), layer, num_layers: base.num_layers });
            }
            let slot = &mut slots[layer as usize * MODULES.len() + module];
            if let Some(first) = slot.factors[matrix as usize].replace(index) {
                return Err(AdapterError::DuplicateModule { first: tensors[first].name.clone(), second: name() });
            }
            slot.path = path;
            Ok(Fate::Mapped { layer: layer as u16, module: MODULES[module], matrix })
        }
        Meaning::Ignorable { reason } => Ok(Fate::Ignored { reason }),
        Meaning::Unsupported(feature) => {
            Err(AdapterError::Unsupported { feature, at: format!("the file has tensor `{}`", tensor.name) })
        }
        Meaning::Unknown { reason } => Err(AdapterError::UnknownTensor { name: name(), reason }),
    }
}

fn missing_pair(tensor: &Tensor, missing: &'static str) -> AdapterError {
    AdapterError::MissingPair { name: tensor.name.clone(), missing }
}

/// The rank, if A is `[rank, in]` and B is `[out, rank]` of the base's module.
fn check_shapes(a: &Tensor, b: &Tensor, module: usize, base: &BaseSpec) -> Result<u32, AdapterError> {
    let shape = base.shape(module);
    let wrong = |tensor: &Tensor, expected: String| {
        Err(AdapterError::WrongShape { name: tensor.name.clone(), shape: tensor.shape.clone(), expected })
    };
    let expected_a = || format!("[rank, {}]", shape.in_features);
    let expected_b = || format!("[{}, rank]", shape.out_features);
    let (&[a_rank, in_features], &[out_features, b_rank]) = (a.shape.as_slice(), b.shape.as_slice()) else {
        return if a.shape.len() == 2 { wrong(b, expected_b()) } else { wrong(a, expected_a()) };
    };
    if in_features != u64::from(shape.in_features) {
        return wrong(a, expected_a());
    }
    if out_features != u64::from(shape.out_features) {
        return wrong(b, expected_b());
    }
    if a_rank != b_rank {
        return Err(AdapterError::RankMismatch { name: b.name.clone(), a_rank, b_rank });
    }
    if a_rank == 0 {
        return Err(AdapterError::RankZero { at: format!("tensor `{}`", a.name) });
    }
    u32::try_from(a_rank).or_else(|_| wrong(a, format!("a rank of at most {}", u32::MAX)))
}

/// PEFT's scale of a module: the patterns' rank and alpha, or the config's. The rank must be that of the shapes, for
/// PEFT builds the factors with it and then cannot load others.
fn scale(name: &str, path: &str, place: (u64, usize), rank: u32, config: &mut Config) -> Result<f32, AdapterError> {
    let (mut config_rank, mut alpha, mut by) = (config.rank, config.alpha, None);
    if !(config.rank_pattern.is_empty() && config.alpha_pattern.is_empty()) {
        let canonical = names::canonical_path(place.0, place.1);
        let names = [path, canonical.as_str()];
        let names = if path == canonical { &names[..1] } else { &names[..] };
        if let Some((key, value)) = config.rank_pattern.lookup(names) {
            (config_rank, by) = (value, Some(key.to_owned()));
        }
        if let Some((_, value)) = config.alpha_pattern.lookup(names) {
            alpha = value;
        }
    }
    if config_rank != rank {
        let by = by.map_or("`r`".into(), |key| format!("`rank_pattern` at `{key}`"));
        return Err(AdapterError::ContradictoryRank { name: name.into(), rank, config_rank, by });
    }
    let divisor = if config.rslora { f64::from(rank).sqrt() } else { f64::from(rank) };
    let scale = alpha / divisor;
    if (scale as f32).is_normal() {
        Ok(scale as f32)
    } else {
        Err(AdapterError::BadScale { name: name.into(), alpha, rank, scale })
    }
}

fn unused_patterns(config: &Config) -> Vec<Warning> {
    let unused = |field, keys| warning("unused_pattern", format!("{field} keys match no module of the file"), keys);
    let ranks = unused("rank_pattern", config.rank_pattern.unused().collect());
    let alphas = unused("alpha_pattern", config.alpha_pattern.unused().collect());
    ranks.into_iter().chain(alphas).collect()
}

/// Compares `target_modules` with what the file has. The tensors are the truth; a difference is worth a warning.
fn compare_targets(targets: &Targets, paths: &[&str]) -> Vec<Warning> {
    match targets {
        Targets::Unstated => Vec::new(),
        Targets::Names(names) => compare_target_names(names, paths),
        Targets::Expression(expression) => {
            // One that the linear-time engine cannot run was good enough for training: nothing to say.
            let Ok(regex) = compile_as_python(expression, &format!("^(?:{expression})$")) else { return Vec::new() };
            let paths = paths.iter().copied().filter(|path| !regex.is_match(path.as_bytes()));
            untargeted(paths.collect()).into_iter().collect()
        }
    }
}

fn compare_target_names(names: &[String], paths: &[&str]) -> Vec<Warning> {
    let names: HashSet<&str> = names.iter().map(String::as_str).collect();
    let mut used = HashSet::new();
    let mut others = Vec::new();
    for path in paths {
        // The path itself, and what follows each of its dots.
        let starts = std::iter::once(0).chain(path.match_indices('.').map(|(dot, _)| dot + 1));
        let targets: Vec<&str> = starts.filter_map(|start| names.get(&path[start..]).copied()).collect();
        if targets.is_empty() {
            others.push(*path);
        }
        used.extend(targets);
    }
    let mut unused: Vec<&str> = names.difference(&used).copied().collect();
    unused.sort_unstable();
    let unused = warning("unused_target", "target_modules match no module of the file".into(), unused);
    untargeted(others).into_iter().chain(unused).collect()
}

fn untargeted(paths: Vec<&str>) -> Option<Warning> {
    warning("untargeted_module", "modules are served although target_modules does not name them".into(), paths)
}

/// A warning about some items, the first few of which it lists; none without items.
fn warning(code: &'static str, sentence: String, items: Vec<&str>) -> Option<Warning> {
    if items.is_empty() {
        return None;
    }
    let mut shown_items: Vec<String> = items.iter().take(MAX_SHOWN).map(|item| format!("`{}`", shown(item))).collect();
    if items.len() > MAX_SHOWN {
        shown_items.push(format!("and {} more", items.len() - MAX_SHOWN));
    }
    Some(Warning { code, message: format!("{sentence}: {}", shown_items.join(", ")) })
}
