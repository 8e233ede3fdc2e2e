//! slora-core
