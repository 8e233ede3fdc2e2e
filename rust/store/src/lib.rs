//! slora-store
