//! A request's way back to Python.

use std::io::{PipeReader, Read};
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;
use slora_core::RequestId;
use slora_runtime::{End, TokenLogprobs};

use crate::errors::request_error;

/// How long a waiting call keeps Python from looking at signals.
pub(crate) const SIGNAL_INTERVAL: Duration = Duration::from_millis(50);

/// The requests that have something new, for one reader of many.
#[pyclass(frozen, module = "slora._core")]
pub(crate) struct Mailbox {
    pub mailbox: Arc<slora_runtime::Mailbox>,
    reader: Mutex<Option<PipeReader>>,
}

#[pymethods]
impl Mailbox {
    #[new]
    #[pyo3(signature = (with_pipe=false))]
    fn new(with_pipe: bool) -> PyResult<Self> {
        let (mailbox, reader) = match with_pipe {
            false => (slora_runtime::Mailbox::default(), None),
            true => slora_runtime::Mailbox::with_pipe().map(|(mailbox, reader)| (mailbox, Some(reader)))?,
        };
        Ok(Self { mailbox: Arc::new(mailbox), reader: Mutex::new(reader) })
    }

    fn wait(&self, py: Python<'_>, timeout_s: f64) -> PyResult<Vec<u64>> {
        let deadline = Instant::now() + Duration::try_from_secs_f64(timeout_s).unwrap_or(Duration::MAX / 4);
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let ready = py.detach(|| self.mailbox.wait(left.min(SIGNAL_INTERVAL)));
            if !ready.is_empty() || left.is_zero() {
                return Ok(numbers(ready));
            }
            py.check_signals()?;
        }
    }

    fn take(&self) -> Vec<u64> {
        numbers(self.mailbox.take())
    }

    fn fileno(&self) -> PyResult<i32> {
        let reader = self.reader.lock().unwrap_or_else(PoisonError::into_inner);
        reader.as_ref().map(|reader| reader.as_raw_fd()).ok_or_else(|| PyValueError::new_err("the mailbox has no pipe"))
    }

    /// Reads what made the pipe readable; only to be called when it is.
    fn clear_pipe(&self) -> PyResult<()> {
        if let Some(reader) = self.reader.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            let mut bytes = [0; 64];
            let _ = reader.read(&mut bytes)?;
        }
        Ok(())
    }

    fn close(&self) {
        *self.reader.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn numbers(ids: Vec<RequestId>) -> Vec<u64> {
    ids.into_iter().map(|id| id.0).collect()
}

/// What is new of a request.
#[pyclass(frozen, module = "slora._core")]
pub(crate) struct Delta {
    delta: slora_runtime::Delta,
    has_prompt_logprobs: bool,
    stops: Arc<[String]>,
}

#[pymethods]
impl Delta {
    #[getter]
    fn is_accepted(&self) -> bool {
        self.delta.is_accepted
    }

    #[getter]
    fn text(&self) -> String {
        let pieces = self.delta.pieces.iter().map(|piece| piece.text.as_str());
        pieces.chain([self.delta.tail.as_str()]).collect()
    }

    #[getter]
    fn token_ids(&self) -> Vec<u32> {
        self.delta.pieces.iter().map(|piece| piece.token).collect()
    }

    #[getter]
    fn logprobs<'py>(&self, py: Python<'py>) -> PyResult<Option<Vec<Bound<'py, PyDict>>>> {
        let pieces = self.delta.pieces.iter();
        pieces.map(|piece| piece.logprobs.as_ref().map(|found| dict(py, found)).transpose()).collect()
    }

    #[getter]
    fn prompt_logprobs<'py>(&self, py: Python<'py>) -> PyResult<Option<Vec<Bound<'py, PyDict>>>> {
        if !self.has_prompt_logprobs {
            return Ok(None);
        }
        self.delta.prompt_logprobs.iter().map(|found| dict(py, found)).collect::<PyResult<_>>().map(Some)
    }

    #[getter]
    fn finish_reason(&self) -> Option<&'static str> {
        match self.delta.end.as_ref()? {
            End::StopToken(_) | End::StopString(_) => Some("stop"),
            End::Length => Some("length"),
            End::Cancelled | End::Error(_) => Some("cancelled"),
        }
    }

    #[getter]
    fn stop_reason<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyAny>>> {
        match self.delta.end {
            Some(End::StopToken(token)) => Ok(Some(token.into_pyobject(py)?.into_any())),
            Some(End::StopString(index)) => Ok(Some(self.stops[index].as_str().into_pyobject(py)?.into_any())),
            _ => Ok(None),
        }
    }
}

fn dict<'py>(py: Python<'py>, found: &TokenLogprobs) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item(found.token, found.logprob)?;
    for (token, logprob) in &found.best {
        dict.set_item(token, logprob)?;
    }
    Ok(dict)
}

/// A request's reader. Dropping it cancels the request.
#[pyclass(frozen, module = "slora._core")]
pub(crate) struct Output {
    pub output: slora_runtime::Output,
    pub stops: Arc<[String]>,
    pub has_prompt_logprobs: bool,
}

#[pymethods]
impl Output {
    #[getter]
    fn id(&self) -> u64 {
        self.output.id().0
    }

    #[getter]
    fn prompt_token_ids(&self) -> Vec<u32> {
        self.output.prompt().to_vec()
    }

    #[getter]
    fn adapter(&self) -> Option<&str> {
        self.output.adapter().map(|name| &**name)
    }

    fn take(&self, py: Python<'_>) -> PyResult<Delta> {
        let delta = py.detach(|| self.output.take());
        if let Some(End::Error(error)) = &delta.end {
            return Err(request_error(error));
        }
        let has_prompt_logprobs = self.has_prompt_logprobs;
        Ok(Delta { delta, has_prompt_logprobs, stops: self.stops.clone() })
    }

    fn cancel(&self) {
        self.output.cancel();
    }
}
