//! slora-runtime
