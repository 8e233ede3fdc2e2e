//! Errors of the Rust side → the exception classes that Python handed over.

use std::collections::HashMap;

use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;
use pyo3::types::PyType;
use slora_core::SubmitError;
use slora_runtime::{RegisterError, RequestError};

static EXCEPTIONS: PyOnceLock<HashMap<String, Py<PyType>>> = PyOnceLock::new();

/// Hands over the classes that this module raises, by name; the first call counts.
#[pyfunction]
pub(crate) fn set_exceptions(py: Python<'_>, exceptions: HashMap<String, Py<PyType>>) {
    let _ = EXCEPTIONS.set(py, exceptions);
}

fn raise(kind: &str, message: String) -> PyErr {
    Python::attach(|py| match EXCEPTIONS.get(py).and_then(|classes| classes.get(kind)) {
        Some(class) => PyErr::from_type(class.bind(py).clone(), message),
        None => PyRuntimeError::new_err(message),
    })
}

pub(crate) fn config_error(message: impl ToString) -> PyErr {
    raise("ConfigError", message.to_string())
}

pub(crate) fn load_error(message: impl ToString) -> PyErr {
    raise("LoadError", message.to_string())
}

pub(crate) fn adapter_error(message: impl ToString) -> PyErr {
    raise("AdapterError", message.to_string())
}

pub(crate) fn bad_request(message: impl ToString) -> PyErr {
    raise("RequestError", message.to_string())
}

pub(crate) fn request_error(error: &RequestError) -> PyErr {
    let kind = match error {
        RequestError::Submit(SubmitError::UnknownAdapter(_)) => "UnknownAdapterError",
        RequestError::Submit(SubmitError::AdapterFailed { .. }) | RequestError::AdapterFailed { .. } => "AdapterError",
        RequestError::EngineFailed(_) => "DeviceError",
        _ => "RequestError",
    };
    raise(kind, error.to_string())
}

pub(crate) fn register_error(error: &RegisterError) -> PyErr {
    match error {
        RegisterError::Stopped(error) => request_error(error),
        RegisterError::Engine(slora_core::AdapterError::Unknown(_)) => raise("UnknownAdapterError", error.to_string()),
        _ => adapter_error(error),
    }
}
