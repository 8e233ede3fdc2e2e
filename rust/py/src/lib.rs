//! `slora._core`: what Python sees of the runtime. Conversions only; what each call means is said where it is made.
#![deny(unsafe_code)]

use pyo3::prelude::*;

mod base;
#[allow(unsafe_code, reason = "the one place that reads and writes buffers of Python's")]
mod buffers;
mod core;
mod errors;
mod load;
mod outputs;
mod sampling;
mod server;
mod text;

#[pymodule]
mod _core {
    #[pymodule_export]
    use super::base::{Base, check_adapter};
    #[pymodule_export]
    use super::core::Core;
    #[pymodule_export]
    use super::errors::set_exceptions;
    #[pymodule_export]
    use super::load::Load;
    #[pymodule_export]
    use super::outputs::{Delta, Mailbox, Output};
    #[pymodule_export]
    use super::sampling::Sampling;
    #[pymodule_export]
    use super::server::Server;
    #[pymodule_export]
    use super::text::Text;

    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
