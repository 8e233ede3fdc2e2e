//! Arguments of a call, taken one by one in the order of the callee's parameters.

use std::collections::VecDeque;

use super::ast::Name;
use super::meter::{Fault, Outcome};
use super::value::Value;

#[derive(Default)]
pub(super) struct Args {
    pub(super) positional: VecDeque<Value>,
    pub(super) keyword: Vec<(Name, Value)>,
}

impl Args {
    /// The next parameter: by position while there are any, then by name.
    pub(super) fn next(&mut self, name: &str) -> Option<Value> {
        self.positional.pop_front().or_else(|| self.named(name))
    }

    pub(super) fn named(&mut self, name: &str) -> Option<Value> {
        let at = self.keyword.iter().position(|(n, _)| &**n == name)?;
        Some(self.keyword.swap_remove(at).1)
    }

    pub(super) fn require(&mut self, name: &str) -> Outcome<Value> {
        match self.next(name) {
            Some(value) => Ok(value),
            None => Fault::invalid(format!("missing argument '{name}'")),
        }
    }

    /// A required string.
    pub(super) fn text(&mut self, name: &str) -> Outcome<Name> {
        match self.require(name)?.defined()? {
            Value::Str(s) => Ok(s),
            other => Fault::invalid(format!("argument '{name}' must be str, not {}", other.type_name())),
        }
    }

    /// An optional integer; `None` counts as absent.
    pub(super) fn int(&mut self, name: &str) -> Outcome<Option<i128>> {
        match self.next(name) {
            None | Some(Value::None) => Ok(None),
            Some(value) => match value.as_int() {
                Some(i) => Ok(Some(i)),
                None => Fault::invalid(format!("argument '{name}' must be int, not {}", value.type_name())),
            },
        }
    }

    pub(super) fn flag(&mut self, name: &str, default: bool) -> bool {
        self.next(name).map_or(default, |v| v.is_true())
    }

    /// All parameters have been taken: anything left is a mistake of the template.
    pub(super) fn finish(self) -> Outcome<()> {
        match (self.positional.len(), self.keyword.first()) {
            (0, None) => Ok(()),
            (_, Some((name, _))) => Fault::invalid(format!("unexpected argument '{name}'")),
            (n, None) => Fault::invalid(format!("{n} arguments too many")),
        }
    }
}
