//! Arrays that Python allocated, as slices.

use std::ptr::NonNull;

use pyo3::buffer::{Element, PyBuffer};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use slora_runtime::HostMemory;

/// A contiguous array that Python lends for the time of one call.
pub(crate) struct Lent<T: Element>(PyBuffer<T>);

// SAFETY: the memory is exported until the value is dropped, which happens with the interpreter attached; between the step
// thread and the runner, who alone have the array, there is no concurrent access.
unsafe impl<T: Element> Send for Lent<T> {}
// SAFETY: as above.
unsafe impl<T: Element> Sync for Lent<T> {}

impl<T: Element + Copy> Lent<T> {
    pub fn new(array: &Bound<'_, PyAny>) -> PyResult<Self> {
        let buffer = PyBuffer::get(array)?;
        if !buffer.is_c_contiguous() {
            return Err(PyValueError::new_err("the array must be contiguous"));
        }
        Ok(Self(buffer))
    }

    pub fn as_slice(&self) -> &[T] {
        if self.0.item_count() == 0 {
            return &[];
        }
        // SAFETY: the buffer is contiguous, of `T`s, and exported as long as `self` lives.
        unsafe { std::slice::from_raw_parts(self.0.buf_ptr().cast(), self.0.item_count()) }
    }

    /// `None`: the array is read-only.
    pub fn as_mut_slice(&mut self) -> Option<&mut [T]> {
        if self.0.readonly() {
            return None;
        }
        // SAFETY: as in `as_slice`; writable, and nobody else looks at it during the call.
        Some(unsafe { std::slice::from_raw_parts_mut(self.0.buf_ptr().cast(), self.0.item_count()) })
    }
}

/// A copy of an optional array.
pub(crate) fn copied<T: Element + Copy>(array: Option<&Bound<'_, PyAny>>) -> PyResult<Vec<T>> {
    array.map_or(Ok(Vec::new()), |array| Ok(Lent::new(array)?.as_slice().to_vec()))
}

/// The host tier's memory, whose owner the caller keeps alive. `num_ready_slabs`: see `HostMemory::with_ready_slabs`.
pub(crate) fn host_memory(
    slabs: &[(usize, usize)],
    page_bytes: usize,
    num_ready_slabs: Option<usize>,
) -> PyResult<HostMemory> {
    let slabs = slabs
        .iter()
        .map(|&(address, bytes)| Ok((NonNull::new(address as *mut u8).ok_or("a slab's address is 0")?, bytes)))
        .collect::<Result<Vec<_>, &str>>()
        .map_err(PyValueError::new_err)?;
    // SAFETY: Python allocated the slabs for this, keeps them alive as long as the engine, and only reads pages whose load
    // was answered.
    let memory = unsafe { HostMemory::new(&slabs, page_bytes) };
    Ok(memory.with_ready_slabs(num_ready_slabs.unwrap_or(slabs.len())))
}
