//! The meter that bounds a rendering, and what can go wrong in one.

/// Units of work for one rendering; a chat of a thousand turns takes about a tenth.
pub(crate) const MAX_FUEL: u64 = 1_000_000;
/// Most bytes a rendering, or a captured part of one, may write.
pub(crate) const MAX_OUTPUT_BYTES: usize = 4 << 20;
/// Bytes of text that cost one unit: copying them takes about as long as evaluating a node.
const BYTES_PER_UNIT: usize = 64;

/// Why a rendering ended early.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Fault {
    /// A bound of the renderer was reached.
    Limit { what: &'static str, limit: u64 },
    /// The template called `raise_exception`.
    Raised(String),
    /// What Jinja2 would raise too: a wrong type, an unknown name, a syntax error.
    Invalid(String),
}

impl Fault {
    pub(super) fn invalid<T>(message: impl Into<String>) -> Result<T, Fault> {
        Err(Fault::Invalid(message.into()))
    }
}

pub(super) type Outcome<T> = Result<T, Fault>;

/// Counts down; everything that costs time or memory asks it first.
pub(super) struct Meter {
    left: u64,
}

impl Meter {
    pub(super) fn new() -> Self {
        Self { left: MAX_FUEL }
    }

    /// Pays for `units` nodes or elements.
    pub(super) fn charge(&mut self, units: usize) -> Outcome<()> {
        match self.left.checked_sub(units as u64) {
            Some(left) => {
                self.left = left;
                Ok(())
            }
            None => {
                self.left = 0;
                Err(Fault::Limit { what: "units of work", limit: MAX_FUEL })
            }
        }
    }

    /// Pays for reading or writing `len` bytes of text.
    pub(super) fn charge_bytes(&mut self, len: usize) -> Outcome<()> {
        self.charge(len / BYTES_PER_UNIT + 1)
    }
}
