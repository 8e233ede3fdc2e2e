//! The load generator of `slora bench serve`.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use slora_server::load::LoadConfig;

use crate::errors::config_error;
use crate::outputs::SIGNAL_INTERVAL;

/// A load on a server, from a thread of its own.
#[pyclass(frozen, module = "slora._core")]
pub(crate) struct Load(Mutex<Option<slora_server::load::Load>>);

impl Load {
    fn lock(&self) -> MutexGuard<'_, Option<slora_server::load::Load>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Load {
    #[new]
    fn new(py: Python<'_>, config: &str) -> PyResult<Self> {
        let config: LoadConfig = serde_json::from_str(config).map_err(config_error)?;
        let started = py.detach(|| slora_server::load::Load::start(config, None));
        Ok(Self(Mutex::new(Some(started.map_err(config_error)?))))
    }

    /// Seconds since the start, requests sent, requests ended.
    fn progress(&self) -> (f64, u64, u64) {
        let progress = self.lock().as_ref().map(slora_server::load::Load::progress).unwrap_or_default();
        (progress.elapsed_s, progress.sent, progress.ended)
    }

    fn wait(&self, py: Python<'_>, timeout_s: f64) -> PyResult<bool> {
        let deadline = Instant::now() + Duration::try_from_secs_f64(timeout_s).unwrap_or(Duration::MAX / 4);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let wait = || self.lock().as_ref().is_none_or(|load| load.wait(left.min(SIGNAL_INTERVAL)));
            if py.detach(wait) {
                return Ok(true);
            }
            if left.is_zero() {
                return Ok(false);
            }
            py.check_signals()?;
        }
    }

    fn stop(&self) {
        self.lock().iter().for_each(slora_server::load::Load::stop);
    }

    /// Waits for the end: the report as JSON, once.
    fn finish(&self, py: Python<'_>) -> PyResult<String> {
        let failed = |error: String| PyRuntimeError::new_err(error);
        let Some(load) = self.lock().take() else { return Err(failed("the load's report was taken".into())) };
        let report = py.detach(|| load.finish()).map_err(|error| failed(error.to_string()))?;
        serde_json::to_string(&report).map_err(|error| failed(error.to_string()))
    }
}
