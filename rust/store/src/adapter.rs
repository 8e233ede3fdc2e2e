//! A checked, registered checkpoint.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use sha2::{Digest, Sha256};

use crate::accounting::{self, Account, Module};
use crate::base::{Dtype, MODULES};
use crate::config::{Config, MAX_CONFIG_BYTES};
use crate::files::{self, RegisteredFile};
use crate::header::Header;
use crate::layout::Layout;
use crate::pack::{PackStats, Packer};
use crate::report::{Fate, Report, Scaling, TensorReport, summarize};
use crate::{AdapterError, BaseSpec, HostPages};

/// A checked, registered checkpoint: its config and header were read, its weights were not.
///
/// Registering thousands of adapters is cheap, and an adapter whose weights are wanted later is packed from the same
/// files or not at all: they are known by size, modification time and inode.
#[derive(Debug)]
pub struct Adapter {
    config_file: RegisteredFile,
    weights_file: RegisteredFile,
    dtype: Dtype,
    page_bytes: u64,
    layout: Layout,
    words: Arc<[i32]>,
    page_layers: Arc<[u16]>,
    report: Report,
    sha256: OnceLock<[u8; 32]>,
}

/// Bytes that are read at a time for the hash.
const HASH_CHUNK_BYTES: usize = 256 << 10;

impl Adapter {
    /// Reads and checks the checkpoint at `path`, a folder that holds `adapter_config.json` and
    /// `adapter_model.safetensors`, or whose only such sub-folder does. Links are followed.
    ///
    /// # Errors
    ///
    /// Whatever keeps the adapter from being served exactly on `base`; `docs/adapters.md` has the table.
    pub fn open(path: &Path, base: &BaseSpec) -> Result<Adapter, AdapterError> {
        check_one_shard(base)?;
        Adapter::open_files(path, base, None)
    }

    /// [`open`](Adapter::open) for a path that a stranger gave: both files must lie beneath one of `roots`, whatever is
    /// renamed meanwhile. The roots are absolute and have no links.
    ///
    /// # Errors
    ///
    /// As `open`, and a file that lies elsewhere.
    pub fn open_beneath(path: &Path, base: &BaseSpec, roots: &[PathBuf]) -> Result<Adapter, AdapterError> {
        check_one_shard(base)?;
        Adapter::open_files(path, base, Some(roots))
    }

    /// [`open`](Adapter::open) for any tensor-parallel rank; not served yet.
    #[doc(hidden)]
    pub fn open_shard(path: &Path, base: &BaseSpec) -> Result<Adapter, AdapterError> {
        Adapter::open_files(path, base, None)
    }

    fn open_files(path: &Path, base: &BaseSpec, roots: Option<&[PathBuf]>) -> Result<Adapter, AdapterError> {
        base.check()?;
        let (config_path, weights_path) = files::locate(path)?;
        let (config_file, mut config) = read_config(config_path.clone(), roots)?;
        config.compare_base(base);
        let (file, weights_file) = RegisteredFile::register(weights_path, roots)?;
        let header = Header::read(&file, &weights_file)?;
        let account = accounting::account(&header.tensors, &mut config, base)?;
        check_ranks(&account, base.max_rank)?;
        let mut layout = Layout::new(&account.modules, &header, base)?;
        Ok(Adapter {
            words: std::mem::take(&mut layout.words).into(),
            page_layers: std::mem::take(&mut layout.page_layers).into(),
            report: report(config_path.parent().unwrap_or(path), &weights_file, &layout, config, account, header),
            config_file,
            weights_file,
            dtype: base.dtype,
            page_bytes: base.page_bytes,
            layout,
            sha256: OnceLock::new(),
        })
    }

    /// Pages of the image.
    pub fn num_pages(&self) -> u32 {
        self.layout.num_pages
    }

    /// Bytes of the image's rows; what pages leave unused between them is not counted.
    pub fn bytes(&self) -> u64 {
        self.layout.row_bytes
    }

    /// Bytes of the safetensors file.
    pub fn file_bytes(&self) -> u64 {
        self.weights_file.bytes()
    }

    /// The descriptor: `num_layers × 7` modules of [`MODULE_WORDS`](crate::MODULE_WORDS) words
    /// (`docs/architecture.md`, "The adapter image").
    pub fn words(&self) -> Arc<[i32]> {
        self.words.clone()
    }

    /// For each image page, the first layer that has data in it: the order in which pages are needed.
    pub fn page_layers(&self) -> Arc<[u16]> {
        self.page_layers.clone()
    }

    /// The tensor accounting.
    pub fn report(&self) -> &Report {
        &self.report
    }

    /// The files at the adapter's paths must still be those that were registered.
    pub fn check_unchanged(&self) -> Result<(), AdapterError> {
        self.config_file.check_unchanged()?;
        self.weights_file.check_unchanged()
    }

    /// SHA-256 of the safetensors file, once [`hash`](Adapter::hash) has read it.
    pub fn sha256(&self) -> Option<&[u8; 32]> {
        self.sha256.get()
    }

    /// Reads the safetensors file for [`sha256`](Adapter::sha256); does nothing the second time.
    ///
    /// # Errors
    ///
    /// A file that cannot be read or is no longer the registered one, and `cancel`, which is looked at every chunk.
    pub fn hash(&self, cancel: &AtomicBool) -> Result<(), AdapterError> {
        if self.sha256.get().is_some() {
            return Ok(());
        }
        let file = self.weights_file.reopen()?;
        let mut hasher = Sha256::new();
        let mut chunk = vec![0; HASH_CHUNK_BYTES.min(self.file_bytes() as usize)];
        let mut offset = 0;
        while offset < self.file_bytes() {
            if cancel.load(Ordering::Relaxed) {
                return Err(AdapterError::Cancelled);
            }
            let len = (self.file_bytes() - offset).min(chunk.len() as u64) as usize;
            self.weights_file.read_at(&file, &mut chunk[..len], offset)?;
            hasher.update(&chunk[..len]);
            offset += len as u64;
        }
        self.weights_file.check_unchanged()?;
        // Whoever was faster found the same.
        let _ = self.sha256.set(hasher.finalize().into());
        Ok(())
    }

    /// Units of work that threads can pack independently: one for each layer that has weights.
    pub fn num_parts(&self) -> usize {
        self.layout.parts.len()
    }

    /// Packs one part. When all parts have been packed, in any order and by any threads, every byte of every page has
    /// been written: rows with weights in the base's dtype, all else with zeros.
    ///
    /// # Errors
    ///
    /// Files that cannot be read or are no longer the registered ones (looked at before and after), weights that are
    /// not finite or do not fit the base's dtype, and `cancel`, which is looked at every chunk. The pages then hold
    /// nothing useful.
    ///
    /// # Panics
    ///
    /// If `part` is not below [`num_parts`](Adapter::num_parts), or `pages` are not as many and as large as the image.
    pub fn pack_part(&self, part: usize, pages: &HostPages, cancel: &AtomicBool) -> Result<PackStats, AdapterError> {
        assert!(part < self.num_parts(), "part {part} of {}", self.num_parts());
        assert_eq!(pages.len(), self.num_pages() as usize, "an image is packed into its own number of pages");
        assert_eq!(pages.page_bytes() as u64, self.page_bytes, "an image is packed into pages of the base's size");
        let file = self.weights_file.reopen()?;
        let packer = Packer {
            registered: &self.weights_file,
            file: &file,
            layout: &self.layout,
            tensors: &self.report.tensors,
            dtype: self.dtype,
            pages,
            cancel,
            stats: PackStats::default(),
        };
        let stats = packer.pack(part);
        // A file that was replaced meanwhile explains bad weights better than the weights do.
        self.check_unchanged()?;
        stats
    }
}

fn read_config(path: PathBuf, roots: Option<&[PathBuf]>) -> Result<(RegisteredFile, Config), AdapterError> {
    let (file, registered) = RegisteredFile::register(path, roots)?;
    if registered.bytes() > MAX_CONFIG_BYTES {
        return Err(AdapterError::ConfigTooLarge { bytes: registered.bytes(), limit: MAX_CONFIG_BYTES });
    }
    let mut json = vec![0; registered.bytes() as usize];
    registered.read_at(&file, &mut json, 0)?;
    Ok((registered, Config::parse(&json)?))
}

fn check_one_shard(base: &BaseSpec) -> Result<(), AdapterError> {
    match base.tp_size {
        1 => Ok(()),
        tp_size => Err(AdapterError::UnsupportedTensorParallel { tp_size }),
    }
}

fn check_ranks(account: &Account, limit: u32) -> Result<(), AdapterError> {
    match account.modules.iter().find(|module| module.rank > limit) {
        None => Ok(()),
        Some(&Module { layer, module, rank, .. }) => {
            Err(AdapterError::RankTooLarge { module: MODULES[module], layer, rank, limit })
        }
    }
}

fn report(
    folder: &Path,
    weights_file: &RegisteredFile,
    layout: &Layout,
    config: Config,
    account: Account,
    header: Header,
) -> Report {
    let mapped = || account.modules.iter().flat_map(|m| [m.a, m.b]).map(|index| &header.tensors[index]);
    let mut dtypes: Vec<Dtype> = mapped().map(|tensor| tensor.dtype).collect();
    dtypes.sort_unstable();
    dtypes.dedup();
    let ranks = || account.modules.iter().map(|m| m.rank);
    Report {
        folder: folder.to_path_buf(),
        base_model: config.base_model,
        file_bytes: weights_file.bytes(),
        image_bytes: layout.row_bytes,
        num_pages: layout.num_pages,
        num_parameters: mapped().map(|tensor| tensor.shape.iter().product::<u64>()).sum(),
        min_rank: ranks().min().unwrap_or(0),
        max_rank: ranks().max().unwrap_or(0),
        scaling: if config.rslora { Scaling::Rslora } else { Scaling::Lora },
        dtypes,
        modules: summarize(account.modules.iter().map(|m| (m.module, m.rank, m.scale))),
        num_mapped: account.modules.len() * 2,
        num_ignored: account.fates.iter().filter(|fate| matches!(fate, Fate::Ignored { .. })).count(),
        warnings: config.warnings.into_iter().chain(account.warnings).collect(),
        tensors: std::iter::zip(header.tensors, account.fates)
            .map(|(tensor, fate)| TensorReport { name: tensor.name, dtype: tensor.dtype, shape: tensor.shape, fate })
            .collect(),
    }
}
