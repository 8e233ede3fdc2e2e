//! The safetensors header: names, dtypes, shapes and places of tensors, checked before a weight is read.
//!
//! The safetensors crate checks a file that is wholly in memory. Here only the header is read, and keys that appear
//! twice, which that crate lets pass, are refused.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::File;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, Visitor};

use crate::files::RegisteredFile;
use crate::{AdapterError, Dtype};

/// Longest header that is read. A 126-layer adapter on all seven linears has about 0.3 MB.
pub(crate) const MAX_HEADER_BYTES: u64 = 8 << 20;
/// Most tensors in a file.
pub(crate) const MAX_TENSORS: usize = 1 << 16;
const MAX_DIMENSIONS: usize = 8;

/// Bytes before the header: its length.
const PREFIX_BYTES: u64 = 8;
/// Read first: enough for the whole header of small adapters.
const FIRST_READ_BYTES: u64 = 16 << 10;

/// One tensor of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tensor {
    pub(crate) name: String,
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<u64>,
    /// Bytes `begin..end` of the data, which starts at [`Header::data_offset`] in the file.
    pub(crate) begin: u64,
    pub(crate) end: u64,
}

/// A checked header.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) tensors: Vec<Tensor>,
    pub(crate) data_offset: u64,
}

impl Header {
    /// Reads the header of an open file; the tensors it lists cover the rest of the file exactly.
    pub(crate) fn read(file: &File, registered: &RegisteredFile) -> Result<Header, AdapterError> {
        let file_bytes = registered.bytes();
        let truncated = |needed| AdapterError::Truncated { path: registered.path.clone(), actual: file_bytes, needed };
        if file_bytes < PREFIX_BYTES {
            return Err(truncated(PREFIX_BYTES));
        }
        let mut bytes = vec![0; file_bytes.min(FIRST_READ_BYTES) as usize];
        registered.read_at(file, &mut bytes, 0)?;
        let header_bytes = header_bytes(&bytes)?;
        let data_offset = PREFIX_BYTES + header_bytes;
        if data_offset > file_bytes {
            return Err(truncated(data_offset));
        }
        let already_read = bytes.len();
        bytes.resize(data_offset as usize, 0);
        if let Some(rest) = bytes.get_mut(already_read..).filter(|rest| !rest.is_empty()) {
            registered.read_at(file, rest, already_read as u64)?;
        }
        let tensors = parse(&bytes[PREFIX_BYTES as usize..])?;
        let end = data_offset.saturating_add(tensors.last().map_or(0, |t| t.end));
        if end > file_bytes {
            return Err(truncated(end));
        }
        if end < file_bytes {
            let path = registered.path.clone();
            return Err(AdapterError::TrailingBytes { path, actual: file_bytes, expected: end });
        }
        Ok(Header { tensors, data_offset })
    }
}

/// The header's length, from the file's first 8 bytes.
fn header_bytes(file: &[u8]) -> Result<u64, AdapterError> {
    let mut prefix = [0; PREFIX_BYTES as usize];
    prefix.copy_from_slice(&file[..PREFIX_BYTES as usize]);
    let bytes = u64::from_le_bytes(prefix);
    if bytes > MAX_HEADER_BYTES {
        return Err(AdapterError::HeaderTooLarge { bytes, limit: MAX_HEADER_BYTES });
    }
    Ok(bytes)
}

/// Parses the header's JSON. The tensors come back in the order of their bytes, which leave no hole and no overlap.
pub(crate) fn parse(json: &[u8]) -> Result<Vec<Tensor>, AdapterError> {
    if json.first() != Some(&b'{') {
        return Err(AdapterError::BadHeader { reason: "it does not begin with `{`".into() });
    }
    let entries: Entries =
        serde_json::from_slice(json).map_err(|error| AdapterError::BadHeader { reason: error.to_string() })?;
    if entries.0.len() > MAX_TENSORS {
        return Err(AdapterError::TooManyTensors { limit: MAX_TENSORS });
    }
    let mut names = HashSet::with_capacity(entries.0.len());
    for (name, _) in &entries.0 {
        if !names.insert(name.0.as_ref()) {
            let key = name.0.to_string();
            return Err(AdapterError::DuplicateKey { file: "the safetensors header", key });
        }
    }
    let mut tensors = entries.0.into_iter().map(|(name, info)| check(&name.0, info)).collect::<Result<Vec<_>, _>>()?;
    tensors.sort_unstable_by_key(|t| (t.begin, t.end));
    check_cover(&tensors)?;
    Ok(tensors)
}

/// One tensor on its own: a dtype we read, and as many bytes as its shape needs.
fn check(name: &str, info: Info<'_>) -> Result<Tensor, AdapterError> {
    let name = name.to_owned();
    let dtype = match info.dtype.as_ref() {
        "F32" => Dtype::F32,
        "F16" => Dtype::F16,
        "BF16" => Dtype::Bf16,
        other => return Err(AdapterError::UnsupportedDtype { name, dtype: other.to_owned() }),
    };
    let Info { shape, data_offsets: (begin, end), .. } = info;
    if shape.len() > MAX_DIMENSIONS {
        let reason = format!("a tensor has {} dimensions, the limit is {MAX_DIMENSIONS}", shape.len());
        return Err(AdapterError::BadHeader { reason });
    }
    let expected = shape.iter().try_fold(dtype.bytes() as u64, |bytes, &n| bytes.checked_mul(n));
    let Some(expected) = expected else { return Err(AdapterError::ShapeOverflow { name, shape }) };
    let Some(actual) = end.checked_sub(begin) else {
        return Err(AdapterError::ReversedOffsets { name, begin, end });
    };
    if actual != expected {
        return Err(AdapterError::WrongTensorBytes { name, shape, expected, actual });
    }
    Ok(Tensor { name, dtype, shape, begin, end })
}

fn check_cover(sorted: &[Tensor]) -> Result<(), AdapterError> {
    let mut previous: Option<&Tensor> = None;
    for tensor in sorted {
        let covered = previous.map_or(0, |t| t.end);
        let (name, begin) = (|| tensor.name.clone(), tensor.begin);
        if begin > covered {
            return Err(AdapterError::Hole { name: name(), begin: covered, end: begin });
        }
        if let Some(previous) = previous.filter(|_| begin < covered) {
            let (previous, end) = (previous.name.clone(), covered);
            return Err(AdapterError::OverlappingTensors { name: name(), previous, begin, end });
        }
        previous = Some(tensor);
    }
    Ok(())
}

#[derive(Deserialize)]
struct Name<'a>(#[serde(borrow)] Cow<'a, str>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Info<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: Vec<u64>,
    data_offsets: (u64, u64),
}

/// All entries but `__metadata__`, in file order, keys that appear twice included.
struct Entries<'a>(Vec<(Name<'a>, Info<'a>)>);

impl<'de> Deserialize<'de> for Entries<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct EntriesVisitor;

        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<Entries<'de>, M::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<Name<'de>>()? {
                    if name.0 == "__metadata__" {
                        map.next_value::<HashMap<String, String>>()?;
                    } else if entries.len() <= MAX_TENSORS {
                        entries.push((name, map.next_value()?));
                    } else {
                        map.next_value::<Info<'de>>()?;
                    }
                }
                Ok(Entries(entries))
            }
        }

        deserializer.deserialize_map(EntriesVisitor)
    }
}
