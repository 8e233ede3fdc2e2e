//! The engine, its step thread's calls and its clients' calls.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{IntoPyDict, PyDict};
use slora_core::{Account, AdapterState, EngineConfig, Eviction, QueueOrder};
use slora_runtime::{AdapterDetails, Runtime, RuntimeConfig, State, StepLogprobs, Stepper, Submission};

use crate::base::Base;
use crate::buffers::{self, Lent};
use crate::errors::{bad_request, config_error, register_error, request_error};
use crate::outputs::{Mailbox, Output};
use crate::sampling::Sampling;
use crate::text::Text;

/// By its name in Python and in settings.
pub(crate) fn queue_order(name: &str) -> PyResult<QueueOrder> {
    match name {
        "fcfs" => Ok(QueueOrder::Fcfs),
        "fair" => Ok(QueueOrder::Fair),
        other => Err(config_error(format!("queue = {other:?} must be \"fcfs\" or \"fair\""))),
    }
}

/// An engine.
#[pyclass(frozen, module = "slora._core")]
pub(crate) struct Core {
    runtime: Arc<Runtime>,
    /// Only the step thread takes it; `None` after `close`.
    stepper: Mutex<Option<Stepper>>,
    layout: Vec<(&'static str, usize, usize, bool)>,
    num_words: usize,
    pid: u32,
    /// Owns the slabs; dropped last.
    _keep_alive: Py<PyAny>,
}

impl Core {
    fn stepper(&self) -> MutexGuard<'_, Option<Stepper>> {
        self.stepper.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn runtime(&self) -> Arc<Runtime> {
        self.runtime.clone()
    }

    /// Threads do not survive a fork: a child's call would wait for ever.
    fn check_process(&self) -> PyResult<()> {
        if std::process::id() == self.pid {
            return Ok(());
        }
        Err(bad_request("the engine was made in another process; hint: make it after the fork"))
    }
}

#[pymethods]
impl Core {
    #[new]
    #[pyo3(signature = (base, text, *, slabs, keep_alive, num_pages, page_tokens, max_batch_tokens, max_running,
                        max_waiting, max_adapters, max_context, eos_token_ids, queue="fcfs", prefetch=true,
                        eviction="cost", max_copy_pages=None, max_step=None, num_loaders=2, num_ready_slabs=None, seed=0))]
    #[allow(clippy::too_many_arguments, reason = "keywords of a Python call")]
    fn new(
        base: &Base,
        text: Option<&Text>,
        slabs: Vec<(usize, usize)>,
        keep_alive: Py<PyAny>,
        num_pages: u32,
        page_tokens: u32,
        max_batch_tokens: u32,
        max_running: u32,
        max_waiting: u32,
        max_adapters: u32,
        max_context: u32,
        eos_token_ids: Vec<u32>,
        queue: &str,
        prefetch: bool,
        eviction: &str,
        max_copy_pages: Option<u32>,
        max_step: Option<u32>,
        num_loaders: usize,
        num_ready_slabs: Option<usize>,
        seed: u64,
    ) -> PyResult<Self> {
        let eviction = match eviction {
            "cost" => Eviction::CostAware,
            "lru" => Eviction::Lru,
            other => return Err(config_error(format!("eviction = {other:?} must be \"cost\" or \"lru\""))),
        };
        let defaults = EngineConfig::default();
        let engine = EngineConfig {
            num_pages,
            page_tokens,
            max_batch_tokens,
            max_running,
            max_waiting,
            max_adapters,
            max_context,
            max_adapter_pages: base.0.max_adapter_pages,
            descriptor_words: base.0.num_layers * (slora_store::MODULES.len() * slora_store::MODULE_WORDS) as u32,
            vocab_size: base.0.vocab_size,
            eos_token_ids,
            max_copy_pages: max_copy_pages.unwrap_or(u32::MAX),
            queue: queue_order(queue)?,
            prefetch,
            eviction,
            max_step: max_step.unwrap_or(defaults.max_step),
            ..defaults
        };
        let host = buffers::host_memory(&slabs, base.0.page_bytes as usize, num_ready_slabs)?;
        let config = RuntimeConfig { engine, base: base.0.clone(), num_loaders, seed };
        let text = text.map(|text| text.0.clone());
        let (runtime, stepper) = Runtime::new(config, host, text).map_err(config_error)?;
        let layout = stepper.engine().layout();
        Ok(Self {
            layout: (layout.arrays().iter())
                .map(|array| (array.name, array.offset, array.capacity, array.is_float))
                .collect(),
            num_words: layout.num_words(),
            runtime: Arc::new(runtime),
            stepper: Mutex::new(Some(stepper)),
            pid: std::process::id(),
            _keep_alive: keep_alive,
        })
    }

    #[getter]
    fn config<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let (dict, config) = (PyDict::new(py), self.runtime.config());
        for (name, value) in [
            ("num_pages", config.num_pages),
            ("num_host_pages", config.num_host_pages),
            ("max_context", config.max_context),
            ("max_batch_tokens", config.max_batch_tokens),
            ("max_running", config.max_running),
            ("max_waiting", config.max_waiting),
            ("max_adapters", config.max_adapters),
            ("max_adapter_pages", config.max_adapter_pages),
        ] {
            dict.set_item(name, value)?;
        }
        Ok(dict)
    }

    #[getter]
    fn layout(&self) -> Vec<(&'static str, usize, usize, bool)> {
        self.layout.clone()
    }

    #[getter]
    fn num_words(&self) -> usize {
        self.num_words
    }

    fn schedule(&self, py: Python<'_>, buffer: &Bound<'_, PyAny>) -> PyResult<u32> {
        let mut buffer = Lent::<i32>::new(buffer)?;
        let counts = py.detach(|| {
            let words = buffer.as_mut_slice().ok_or("the plan's buffer is read-only")?;
            let mut stepper = self.stepper();
            Ok::<_, &str>(stepper.as_mut().and_then(|stepper| stepper.schedule(words)))
        });
        Ok(counts.map_err(PyValueError::new_err)?.map_or(0, |counts| counts.step))
    }

    #[pyo3(signature = (step, ids, chosen_logprobs=None, best_ids=None, best_logprobs=None, prompt_logprobs=None,
                        prompt_best_ids=None, prompt_best_logprobs=None))]
    #[allow(clippy::too_many_arguments, reason = "arrays of one step")]
    fn commit(
        &self,
        py: Python<'_>,
        step: u32,
        ids: &Bound<'_, PyAny>,
        chosen_logprobs: Option<&Bound<'_, PyAny>>,
        best_ids: Option<&Bound<'_, PyAny>>,
        best_logprobs: Option<&Bound<'_, PyAny>>,
        prompt_logprobs: Option<&Bound<'_, PyAny>>,
        prompt_best_ids: Option<&Bound<'_, PyAny>>,
        prompt_best_logprobs: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let logprobs = StepLogprobs {
            chosen: buffers::copied(chosen_logprobs)?,
            best_ids: buffers::copied(best_ids)?,
            best: buffers::copied(best_logprobs)?,
            prompt: buffers::copied(prompt_logprobs)?,
            prompt_best_ids: buffers::copied(prompt_best_ids)?,
            prompt_best: buffers::copied(prompt_best_logprobs)?,
        };
        let ids = Lent::<i32>::new(ids)?;
        py.detach(|| {
            if let Some(stepper) = self.stepper().as_mut() {
                stepper.commit(step, ids.as_slice(), logprobs);
            }
        });
        Ok(())
    }

    fn copies_done(&self, step: u32) {
        if let Some(stepper) = self.stepper().as_mut() {
            stepper.copies_done(step);
        }
    }

    fn slabs_ready(&self, py: Python<'_>, num_slabs: usize) {
        py.detach(|| self.runtime.slabs_ready(num_slabs));
    }

    fn wait(&self, py: Python<'_>, timeout_s: f64) -> bool {
        let timeout = Duration::try_from_secs_f64(timeout_s).unwrap_or_default();
        py.detach(|| self.runtime.wait(timeout))
    }

    fn fail(&self, py: Python<'_>, reason: &str) {
        py.detach(|| self.runtime.fail(reason));
    }

    fn submit(
        &self,
        py: Python<'_>,
        prompt: &Bound<'_, PyAny>,
        adapter: Option<&str>,
        sampling: &Sampling,
        mailbox: &Mailbox,
        wake_on_token: bool,
    ) -> PyResult<Output> {
        self.check_process()?;
        let Sampling(sampling) = sampling;
        let prompt: Vec<u32> = prompt.extract().map_err(|error| {
            bad_request(format!("the prompt must be a list of token ids from 0 to {}: {error}", u32::MAX))
        })?;
        let submission = Submission {
            prompt,
            adapter: adapter.map(Into::into),
            account: Account::default(),
            sampling: sampling.clone(),
            wake: mailbox.mailbox.clone(),
            wakes_on_token: wake_on_token,
        };
        let output = py.detach(|| self.runtime.submit(submission)).map_err(|error| request_error(&error))?;
        let has_prompt_logprobs = sampling.params.prompt_logprobs.is_some();
        Ok(Output { output, stops: sampling.stops.clone().into(), has_prompt_logprobs })
    }

    #[pyo3(signature = (name, path, replace=false, pinned=false))]
    fn register<'py>(
        &self,
        py: Python<'py>,
        name: &str,
        path: PathBuf,
        replace: bool,
        pinned: bool,
    ) -> PyResult<Bound<'py, PyDict>> {
        self.check_process()?;
        let details = py.detach(|| self.runtime.register(name, &path, replace, pinned));
        adapter_dict(py, &details.map_err(|error| register_error(&error))?)
    }

    fn unload(&self, py: Python<'_>, name: &str) -> PyResult<()> {
        self.check_process()?;
        py.detach(|| self.runtime.unload(name)).map_err(|error| register_error(&error))
    }

    fn pin(&self, py: Python<'_>, name: &str, pinned: bool) -> PyResult<()> {
        self.check_process()?;
        py.detach(|| self.runtime.pin(name, pinned)).map_err(|error| register_error(&error))
    }

    fn adapter<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Option<Bound<'py, PyDict>>> {
        self.check_process()?;
        let details = py.detach(|| self.runtime.adapter(name)).map_err(|error| request_error(&error))?;
        details.map(|details| adapter_dict(py, &details)).transpose()
    }

    fn adapters<'py>(&self, py: Python<'py>) -> PyResult<Vec<Bound<'py, PyDict>>> {
        self.check_process()?;
        let all = py.detach(|| self.runtime.adapters()).map_err(|error| request_error(&error))?;
        all.iter().map(|details| adapter_dict(py, details)).collect()
    }

    fn adapter_names(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        self.check_process()?;
        let all = py.detach(|| self.runtime.adapters()).map_err(|error| request_error(&error))?;
        Ok(all.iter().map(|details| details.info.name.to_string()).collect())
    }

    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        let snapshot = self.runtime.snapshot();
        for (name, value) in snapshot.engine.named() {
            dict.set_item(name, value)?;
        }
        dict.set_item("load_us", snapshot.load_us)?;
        Ok(dict)
    }

    #[getter]
    fn failure(&self) -> Option<String> {
        match self.runtime.state() {
            State::Failed(reason) => Some(reason.to_string()),
            _ => None,
        }
    }

    fn begin_close(&self, py: Python<'_>) {
        py.detach(|| self.runtime.begin_close());
    }

    fn close(&self, py: Python<'_>) {
        py.detach(|| {
            let mut stepper = self.stepper().take();
            self.runtime.close(stepper.as_mut());
        });
    }
}

impl Drop for Core {
    fn drop(&mut self) {
        if std::process::id() == self.pid {
            self.runtime.close(self.stepper().take().as_mut());
        }
    }
}

fn adapter_dict<'py>(py: Python<'py>, details: &AdapterDetails) -> PyResult<Bound<'py, PyDict>> {
    let (dict, info) = (PyDict::new(py), &details.info);
    let state = match info.state {
        AdapterState::Registered => "registered",
        AdapterState::Loading => "loading",
        AdapterState::Host => "host",
        AdapterState::Resident => "resident",
        AdapterState::Failed => "failed",
    };
    dict.set_item("name", &*info.name)?;
    dict.set_item("version", info.version)?;
    dict.set_item("state", state)?;
    dict.set_item("reason", info.failure.as_ref().map(|failure| &*failure.message))?;
    dict.set_item("num_pages", info.num_pages)?;
    dict.set_item("bytes", info.bytes)?;
    dict.set_item("pins", info.pins)?;
    dict.set_item("unfinished", info.unfinished)?;
    dict.set_item("pinned", info.pinned)?;
    dict.set_item("replacing", info.replacing)?;
    if let Some(checkpoint) = &details.checkpoint {
        let ranks = PyDict::new(py);
        for module in &checkpoint.report().modules {
            ranks.set_item(module.module, (module.min_rank, module.max_rank))?;
        }
        dict.set_item("ranks", ranks)?;
        dict.set_item("path", &checkpoint.report().folder)?;
        let warnings = checkpoint.report().warnings.iter();
        let warnings = warnings.map(|warning| [("code", warning.code), ("message", &warning.message)].into_py_dict(py));
        dict.set_item("warnings", warnings.collect::<PyResult<Vec<_>>>()?)?;
    }
    Ok(dict)
}
