//! The HTTP server, beside the engine in one process.

use std::time::{Duration, Instant};

use pyo3::prelude::*;
use slora_server::ServerConfig;

use crate::core::{Core, queue_order};
use crate::errors::config_error;
use crate::outputs::SIGNAL_INTERVAL;

/// A running HTTP server. It needs no interpreter: requests go straight to the engine, tokens straight to their sockets.
#[pyclass(frozen, module = "slora._core")]
pub(crate) struct Server(slora_server::Server);

#[pymethods]
impl Server {
    #[new]
    fn new(py: Python<'_>, core: &Core, config: &str) -> PyResult<Self> {
        let config = parse(config)?;
        let runtime = core.runtime();
        py.detach(|| slora_server::Server::start(config, runtime)).map(Self).map_err(config_error)
    }

    #[staticmethod]
    fn check(config: &str, queue: &str) -> PyResult<()> {
        slora_server::Server::check(&parse(config)?, queue_order(queue)?).map_err(config_error)
    }

    #[staticmethod]
    fn default_config() -> PyResult<String> {
        serde_json::to_string(&ServerConfig::default()).map_err(config_error)
    }

    #[getter]
    fn address(&self) -> String {
        self.0.address().to_string()
    }

    fn exit_after_failure(&self, grace_s: f64) -> PyResult<()> {
        let grace = Duration::try_from_secs_f64(grace_s).map_err(config_error)?;
        self.0.exit_after_failure(grace).map_err(config_error)
    }

    fn begin_drain(&self) {
        self.0.begin_drain();
    }

    fn wait(&self, py: Python<'_>, timeout_s: f64) -> PyResult<bool> {
        let deadline = Instant::now() + Duration::try_from_secs_f64(timeout_s).unwrap_or(Duration::MAX / 4);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if py.detach(|| self.0.wait(left.min(SIGNAL_INTERVAL))) {
                return Ok(true);
            }
            if left.is_zero() {
                return Ok(false);
            }
            py.check_signals()?;
        }
    }

    fn stop(&self, py: Python<'_>) {
        py.detach(|| self.0.stop());
    }
}

fn parse(config: &str) -> PyResult<ServerConfig> {
    serde_json::from_str(config).map_err(config_error)
}
