//! slora-text
