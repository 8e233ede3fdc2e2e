//! `adapter_config.json`: PEFT's `LoraConfig`, read so that nothing which changes the computation passes unseen.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;
use std::marker::PhantomData;

use serde::Deserialize;
use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;

use crate::error::{Feature, shown};
use crate::pattern::Patterns;
use crate::report::Warning;
use crate::{AdapterError, BaseSpec};

/// Largest config that is read.
pub(crate) const MAX_CONFIG_BYTES: u64 = 1 << 20;

const FILE: &str = "adapter_config.json";
/// PEFT's default of both `r` and `lora_alpha`.
const DEFAULT_RANK: u32 = 8;

/// Keys that describe training or only validate the target; any value is accepted.
const IGNORED: [&str; 15] = [
    "auto_mapping",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_dropout",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "task_type",
];

/// Keys that change the computation, or the base, when they are not null, false or empty.
const VARIANTS: [(&str, Feature); 17] = [
    ("alora_invocation_tokens", Feature::Alora),
    ("arrow_config", Feature::Arrow),
    ("corda_config", Feature::Corda),
    ("ensure_weight_tying", Feature::WeightTying),
    ("eva_config", Feature::Eva),
    ("kasa_config", Feature::Kasa),
    ("layer_replication", Feature::LayerReplication),
    ("lora_bias", Feature::LoraBias),
    ("lora_ga_config", Feature::LoraGa),
    ("modules_to_save", Feature::ModulesToSave),
    ("monteclora_config", Feature::Monteclora),
    ("target_parameters", Feature::TargetParameters),
    ("trainable_token_indices", Feature::TrainableTokens),
    ("use_bdlora", Feature::Bdlora),
    ("use_dora", Feature::Dora),
    ("use_qalora", Feature::Qalora),
    ("velora_config", Feature::Velora),
];

/// Initialisations by name that leave the base as it is. All others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it when
/// PEFT loads the adapter; what PEFT saved as converted says `true` instead.
const HARMLESS_INITS: [&str; 4] = ["eva", "gaussian", "mica", "orthogonal"];

/// Which modules the config says were trained.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Targets {
    /// PEFT's default for the architecture, or `all-linear`: nothing to compare with.
    Unstated,
    /// Exact names or dotted suffixes.
    Names(Vec<String>),
    /// A regular expression for the whole module name.
    Expression(String),
}

/// The part of the config that serving needs.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) rank: u32,
    pub(crate) alpha: f64,
    pub(crate) rslora: bool,
    pub(crate) rank_pattern: Patterns<u32>,
    pub(crate) alpha_pattern: Patterns<f64>,
    pub(crate) targets: Targets,
    pub(crate) base_model: Option<String>,
    pub(crate) warnings: Vec<Warning>,
}

impl Config {
    /// Reads and checks the file's bytes.
    pub(crate) fn parse(json: &[u8]) -> Result<Config, AdapterError> {
        let entries: Entries<&RawValue> =
            serde_json::from_slice(json).map_err(|error| AdapterError::BadConfig { reason: error.to_string() })?;
        let mut config = Config {
            rank: DEFAULT_RANK,
            alpha: f64::from(DEFAULT_RANK),
            rslora: false,
            rank_pattern: Patterns::default(),
            alpha_pattern: Patterns::default(),
            targets: Targets::Unstated,
            base_model: None,
            warnings: Vec::new(),
        };
        let entries = entries.without_duplicates()?;
        check_peft_type(&entries)?;
        for (key, value) in entries {
            config.read_entry(&key, value)?;
        }
        Ok(config)
    }

    fn read_entry(&mut self, key: &str, value: &RawValue) -> Result<(), AdapterError> {
        match key {
            "peft_type" => {}
            "r" => {
                self.rank = require(value, "r", "a positive integer")?;
                check_rank(self.rank, || "adapter_config.json: `r`".into())?;
            }
            "lora_alpha" => {
                self.alpha = require(value, "lora_alpha", POSITIVE)?;
                check_alpha("lora_alpha", self.alpha)?;
            }
            "use_rslora" => self.rslora = read(value, "use_rslora", "true or false")?.unwrap_or(false),
            "rank_pattern" => {
                let table = read_table(value, "rank_pattern", "an object of positive integers")?;
                for (pattern, rank) in &table {
                    check_rank(*rank, || format!("adapter_config.json: `rank_pattern` at `{pattern}`"))?;
                }
                self.rank_pattern = Patterns::compile("rank_pattern", table)?;
            }
            "alpha_pattern" => {
                let table = read_table(value, "alpha_pattern", "an object of positive numbers")?;
                table.iter().try_for_each(|(_, alpha)| check_alpha("alpha_pattern", *alpha))?;
                self.alpha_pattern = Patterns::compile("alpha_pattern", table)?;
            }
            "target_modules" => self.targets = read_targets(value)?,
            "base_model_name_or_path" => self.base_model = read(value, "base_model_name_or_path", "a string")?,
            "bias" => self.read_bias(value)?,
            "init_lora_weights" => check_init(value)?,
            _ if IGNORED.contains(&key) || is_inactive(value) => {}
            _ => {
                let value = one_line(value);
                return Err(match VARIANTS.iter().find(|(name, _)| *name == key) {
                    Some(&(_, feature)) => {
                        AdapterError::Unsupported { feature, at: format!("adapter_config.json has `{key}` = {value}") }
                    }
                    None => AdapterError::UnknownConfigKey { key: key.into(), value },
                });
            }
        }
        Ok(())
    }

    fn read_bias(&mut self, value: &RawValue) -> Result<(), AdapterError> {
        const EXPECTED: &str = "\"none\", \"all\" or \"lora_only\"";
        match read::<String>(value, "bias", EXPECTED)?.as_deref() {
            None | Some("none") => Ok(()),
            // What counts is whether the file has bias tensors; they are refused by name.
            Some("all" | "lora_only") => {
                self.warn("bias", format!("`bias` is {}, but only weights are served", value.get()));
                Ok(())
            }
            Some(_) => bad_value("bias", value.get(), EXPECTED),
        }
    }

    /// Warns when the config names another base. Names are compared by their last component: the same base lies at
    /// different paths on different machines.
    pub(crate) fn compare_base(&mut self, base: &BaseSpec) {
        let last = |name: &str| name.trim_end_matches('/').rsplit('/').next().unwrap_or("").to_lowercase();
        if let (Some(trained_on), Some(served)) = (&self.base_model, &base.name)
            && last(trained_on) != last(served)
        {
            let message = format!("trained on base `{}`, served on `{}`", shown(trained_on), shown(served));
            self.warn("base_mismatch", message);
        }
    }

    fn warn(&mut self, code: &'static str, message: String) {
        self.warnings.push(Warning { code, message });
    }
}

const POSITIVE: &str = "a positive finite number";

fn check_peft_type(entries: &[(Cow<'_, str>, &RawValue)]) -> Result<(), AdapterError> {
    let peft_type = entries.iter().find(|(key, _)| key == "peft_type").map_or("missing", |(_, value)| value.get());
    if serde_json::from_str::<String>(peft_type).is_ok_and(|kind| kind == "LORA") {
        Ok(())
    } else {
        Err(AdapterError::NotLora { peft_type: peft_type.into() })
    }
}

fn check_init(value: &RawValue) -> Result<(), AdapterError> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Init {
        Flag(bool),
        Name(String),
    }
    match read(value, "init_lora_weights", "true, false or a name")? {
        None | Some(Init::Flag(true | false)) => Ok(()),
        Some(Init::Name(name)) if HARMLESS_INITS.contains(&name.as_str()) => Ok(()),
        Some(Init::Name(name)) => Err(AdapterError::Unsupported {
            feature: Feature::Init,
            at: format!("adapter_config.json has `init_lora_weights` = \"{name}\""),
        }),
    }
}

fn check_rank(rank: u32, at: impl FnOnce() -> String) -> Result<(), AdapterError> {
    if rank == 0 { Err(AdapterError::RankZero { at: at() }) } else { Ok(()) }
}

fn check_alpha(key: &'static str, alpha: f64) -> Result<(), AdapterError> {
    if alpha.is_finite() && alpha > 0.0 { Ok(()) } else { bad_value(key, &alpha.to_string(), POSITIVE) }
}

fn read_targets(value: &RawValue) -> Result<Targets, AdapterError> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Form {
        One(String),
        Many(Vec<String>),
    }
    Ok(match read(value, "target_modules", "a string or a list of strings")? {
        None => Targets::Unstated,
        Some(Form::One(text)) if text == "all-linear" => Targets::Unstated,
        Some(Form::One(expression)) => Targets::Expression(expression),
        Some(Form::Many(names)) => Targets::Names(names),
    })
}

fn read<T: DeserializeOwned>(
    value: &RawValue,
    key: &'static str,
    expected: &'static str,
) -> Result<Option<T>, AdapterError> {
    serde_json::from_str(value.get()).or_else(|_| bad_value(key, value.get(), expected))
}

/// As PEFT, which computes with it: null is no number.
fn require<T: DeserializeOwned>(
    value: &RawValue,
    key: &'static str,
    expected: &'static str,
) -> Result<T, AdapterError> {
    read(value, key, expected)?.map_or_else(|| bad_value(key, value.get(), expected), Ok)
}

fn read_table<T: DeserializeOwned>(
    value: &RawValue,
    key: &'static str,
    expected: &'static str,
) -> Result<Vec<(String, T)>, AdapterError> {
    let entries: Option<Entries<T>> =
        serde_json::from_str(value.get()).or_else(|_| bad_value(key, value.get(), expected))?;
    let entries = entries.unwrap_or(Entries(Vec::new())).without_duplicates()?;
    Ok(entries.into_iter().map(|(key, value)| (key.into_owned(), value)).collect())
}

fn bad_value<T>(key: &'static str, value: &str, expected: &'static str) -> Result<T, AdapterError> {
    Err(AdapterError::BadConfigValue { key, value: value.into(), expected })
}

/// Without the file's own layout.
fn one_line(value: &RawValue) -> String {
    serde_json::from_str::<serde_json::Value>(value.get())
        .map_or_else(|_| value.get().into(), |value| value.to_string())
}

/// Null, false or empty.
fn is_inactive(value: &RawValue) -> bool {
    match value.get() {
        "null" | "false" | "\"\"" => true,
        text => {
            let inside = text.strip_prefix('[').and_then(|t| t.strip_suffix(']'));
            let inside = inside.or_else(|| text.strip_prefix('{').and_then(|t| t.strip_suffix('}')));
            inside.is_some_and(|inside| inside.bytes().all(|b| b.is_ascii_whitespace()))
        }
    }
}

/// An object's entries in file order, keys that appear twice included.
struct Entries<'a, T>(Vec<(Cow<'a, str>, T)>);

impl<'a, T> Entries<'a, T> {
    fn without_duplicates(self) -> Result<Vec<(Cow<'a, str>, T)>, AdapterError> {
        let mut keys = HashSet::with_capacity(self.0.len());
        match self.0.iter().find(|(key, _)| !keys.insert(key.as_ref())) {
            Some((key, _)) => Err(AdapterError::DuplicateKey { file: FILE, key: key.to_string() }),
            None => Ok(self.0),
        }
    }
}

impl<'de: 'a, 'a, T: Deserialize<'de>> Deserialize<'de> for Entries<'a, T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for EntriesVisitor<T> {
            type Value = Vec<(Cow<'de, str>, T)>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Self::Value, M::Error> {
                let mut entries = Vec::new();
                while let Some(key) = map.next_key::<String>()? {
                    entries.push((Cow::Owned(key), map.next_value()?));
                }
                Ok(entries)
            }
        }

        deserializer.deserialize_map(EntriesVisitor(PhantomData)).map(Entries)
    }
}
