//! slora._core
