//! Checkpoints made in temporary folders, for the tests of `slora-store`.
#![allow(dead_code, missing_docs, reason = "each test program uses a part of it")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

use std::alloc::{Layout, alloc, dealloc};
use std::fs;
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::AtomicBool;

use slora_store::{Adapter, AdapterError, BaseSpec, Dtype, HostPages, MODULES, PackStats};

pub const HIDDEN: u32 = 24;
pub const INTERMEDIATE: u32 = 40;

/// A base with widths that are not multiples of 8, so that rows need padding.
pub fn tiny_base() -> BaseSpec {
    BaseSpec {
        num_layers: 3,
        hidden: HIDDEN,
        intermediate: INTERMEDIATE,
        num_heads: 4,
        num_kv_heads: 2,
        head_dim: 5,
        vocab_size: 64,
        dtype: Dtype::F32,
        page_bytes: 512,
        tp_rank: 0,
        tp_size: 1,
        name: Some("tiny/base".into()),
        max_adapter_pages: 4096,
        max_rank: u32::MAX,
    }
}

/// `(in, out)` of a module, written down again so that the crate's own table is not tested with itself.
pub fn widths(base: &BaseSpec, module: &str) -> (u32, u32) {
    let (q, kv) = (base.num_heads * base.head_dim, base.num_kv_heads * base.head_dim);
    match module {
        "q_proj" => (base.hidden, q),
        "k_proj" | "v_proj" => (base.hidden, kv),
        "o_proj" => (q, base.hidden),
        "gate_proj" | "up_proj" => (base.hidden, base.intermediate),
        "down_proj" => (base.intermediate, base.hidden),
        _ => panic!("no module {module}"),
    }
}

/// A reproducible stream of numbers.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }

    pub fn pick<'a, T>(&mut self, items: &'a [T]) -> &'a T {
        &items[self.below(items.len())]
    }

    /// A weight that every dtype holds exactly.
    pub fn weight(&mut self) -> f32 {
        (self.below(255) as f32 - 127.0) / 64.0
    }
}

/// One tensor of a file to be written.
#[derive(Debug, Clone)]
pub struct RawTensor {
    pub name: String,
    pub dtype: String,
    pub shape: Vec<u64>,
    pub data: Vec<u8>,
}

impl RawTensor {
    pub fn new(name: &str, dtype: Dtype, shape: &[u32], values: &[f32]) -> RawTensor {
        RawTensor {
            name: name.into(),
            dtype: dtype.name().to_uppercase(),
            shape: shape.iter().map(|&n| n.into()).collect(),
            data: values.iter().flat_map(|&x| encode(x, dtype)).collect(),
        }
    }

    pub fn zeros(name: &str, shape: &[u32]) -> RawTensor {
        RawTensor::new(name, Dtype::F32, shape, &vec![0.25; shape.iter().product::<u32>() as usize])
    }
}

pub fn encode(x: f32, dtype: Dtype) -> Vec<u8> {
    match dtype {
        Dtype::F32 => x.to_le_bytes().to_vec(),
        Dtype::F16 => half::f16::from_f32(x).to_le_bytes().to_vec(),
        Dtype::Bf16 => half::bf16::from_f32(x).to_le_bytes().to_vec(),
    }
}

pub fn decode(bytes: &[u8], dtype: Dtype) -> f32 {
    match dtype {
        Dtype::F32 => f32::from_le_bytes(bytes.try_into().unwrap()),
        Dtype::F16 => half::f16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
        Dtype::Bf16 => half::bf16::from_le_bytes(bytes.try_into().unwrap()).to_f32(),
    }
}

pub fn module_path(layer: u32, module: &str) -> String {
    let parent = if MODULES[..4].contains(&module) { "self_attn" } else { "mlp" };
    format!("model.layers.{layer}.{parent}.{module}")
}

pub fn tensor_name(layer: u32, module: &str, matrix: char) -> String {
    format!("base_model.model.{}.lora_{matrix}.weight", module_path(layer, module))
}

/// A and B of one module, all 0.25.
pub fn pair(base: &BaseSpec, layer: u32, module: &str, rank: u32) -> [RawTensor; 2] {
    let (input, output) = widths(base, module);
    [
        RawTensor::zeros(&tensor_name(layer, module, 'A'), &[rank, input]),
        RawTensor::zeros(&tensor_name(layer, module, 'B'), &[output, rank]),
    ]
}

/// A safetensors file: the header's JSON, padded to 8 bytes, and the data.
pub fn safetensors(header: &str, data: &[u8]) -> Vec<u8> {
    let mut header = header.as_bytes().to_vec();
    header.resize(header.len().next_multiple_of(8), b' ');
    [&(header.len() as u64).to_le_bytes(), header.as_slice(), data].concat()
}

pub fn header_of(tensors: &[RawTensor]) -> (String, Vec<u8>) {
    let mut data = Vec::new();
    let entries = tensors.iter().map(|t| {
        let begin = data.len();
        data.extend_from_slice(&t.data);
        let (name, shape) = (serde_json::to_string(&t.name).unwrap(), &t.shape);
        format!(r#"{name}:{{"dtype":"{}","shape":{shape:?},"data_offsets":[{begin},{}]}}"#, t.dtype, data.len())
    });
    let entries: Vec<String> = std::iter::once(r#""__metadata__":{"format":"pt"}"#.to_owned()).chain(entries).collect();
    (format!("{{{}}}", entries.join(",")), data)
}

/// A checkpoint in a folder of its own, which goes with the value.
pub struct Checkpoint {
    pub folder: tempfile::TempDir,
}

impl Checkpoint {
    pub fn empty() -> Checkpoint {
        Checkpoint { folder: tempfile::tempdir().unwrap() }
    }

    /// `config` is the inside of a JSON object; `peft_type` is added.
    pub fn new(config: &str, tensors: &[RawTensor]) -> Checkpoint {
        let checkpoint = Checkpoint::empty();
        let comma = if config.is_empty() { "" } else { "," };
        checkpoint.write_config(&format!(r#"{{"peft_type":"LORA"{comma}{config}}}"#));
        checkpoint.write_tensors(tensors);
        checkpoint
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn config_path(&self) -> PathBuf {
        self.path().join("adapter_config.json")
    }

    pub fn weights_path(&self) -> PathBuf {
        self.path().join("adapter_model.safetensors")
    }

    pub fn write_config(&self, json: &str) {
        fs::write(self.config_path(), json).unwrap();
    }

    pub fn write_tensors(&self, tensors: &[RawTensor]) {
        let (header, data) = header_of(tensors);
        self.write_weights(&safetensors(&header, &data));
    }

    pub fn write_weights(&self, bytes: &[u8]) {
        fs::write(self.weights_path(), bytes).unwrap();
    }

    pub fn open(&self, base: &BaseSpec) -> Result<Adapter, AdapterError> {
        Adapter::open(self.path(), base)
    }
}

/// Pages that start out full of junk.
pub struct Pages {
    pointers: Vec<NonNull<u8>>,
    page_bytes: usize,
}

impl Pages {
    pub fn of(adapter: &Adapter, base: &BaseSpec) -> Pages {
        let page_bytes = base.page_bytes as usize;
        let layout = Layout::from_size_align(page_bytes, 16).unwrap();
        let page = |_| {
            // SAFETY: the layout is not of size 0, and the bytes written are those allocated.
            unsafe {
                let page = NonNull::new(alloc(layout)).unwrap();
                page.write_bytes(0xa5, page_bytes);
                page
            }
        };
        Pages { pointers: (0..adapter.num_pages()).map(page).collect(), page_bytes }
    }

    pub fn lend(&mut self) -> HostPages {
        // SAFETY: the pages are valid and initialised, and the tests read them only after packing.
        unsafe { HostPages::new(self.pointers.clone(), self.page_bytes) }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let pages = self.pointers.iter();
        // SAFETY: as in `lend`.
        pages.flat_map(|page| unsafe { std::slice::from_raw_parts(page.as_ptr(), self.page_bytes) }.to_vec()).collect()
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        let layout = Layout::from_size_align(self.page_bytes, 16).unwrap();
        for page in &self.pointers {
            // SAFETY: allocated with this layout.
            unsafe { dealloc(page.as_ptr(), layout) };
        }
    }
}

/// Packs all parts on this thread; the image's bytes.
pub fn pack(adapter: &Adapter, base: &BaseSpec) -> Result<(Vec<u8>, PackStats), AdapterError> {
    let mut pages = Pages::of(adapter, base);
    let host = pages.lend();
    let mut stats = PackStats::default();
    for part in 0..adapter.num_parts() {
        stats += adapter.pack_part(part, &host, &AtomicBool::new(false))?;
    }
    drop(host);
    Ok((pages.bytes(), stats))
}

/// The least that is accepted: one module of rank 8.
pub fn good_pair() -> Vec<RawTensor> {
    pair(&tiny_base(), 0, "q_proj", 8).to_vec()
}

pub const A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
pub const B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";

/// The refusal of `checkpoint`, at registration or while packing.
pub fn refusal(checkpoint: &Checkpoint, base: &BaseSpec) -> Result<(), AdapterError> {
    pack(&checkpoint.open(base)?, base).map(|_| ())
}

#[track_caller]
pub fn expect(result: Result<(), AdapterError>, code: &str, words: &[&str]) {
    let error = result.expect_err(code);
    let message = error.to_string();
    assert_eq!(error.code(), code, "{message}");
    assert!(words.iter().all(|word| message.contains(word)), "{words:?} in {message:?}");
    assert!(message.len() < 2000 && !message.contains(char::is_control), "{message:?}");
    assert!(error.to_json().contains(code));
}
