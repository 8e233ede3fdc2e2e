//! The renderer: its scopes and output, and the values of expressions.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use indexmap::IndexMap;

use super::Program;
use super::ast::{CompareOp, Expr, ExprKind, For, Macro, Name};
use super::functions::Function;
use super::meter::{Fault, MAX_OUTPUT_BYTES, Meter, Outcome};
use super::text::write_str;
use super::value::{Key, Value};
use super::{filters, methods, ops, predicates};

/// Deepest chain of calls, tags and operators being evaluated: keeps the native stack under half a megabyte.
const MAX_CALL_DEPTH: u32 = 300;

/// The time that `strftime_now` tells.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    pub(crate) unix_s: i64,
    pub(crate) utc_offset_s: i32,
}

/// Renders a program over its variables; a fault comes with its line.
pub(crate) fn render(program: &Program, variables: Vec<(Name, Value)>, clock: Clock) -> Result<String, (Fault, u32)> {
    let root = Scope::new(None);
    for function in Function::ALL {
        root.set(Name::from(function.name()), Value::Function(function));
    }
    for (name, value) in variables {
        root.set(name, value);
    }
    let mut renderer = Renderer {
        meter: Meter::new(),
        clock,
        scope: root,
        out: vec![String::new()],
        namespaces: Vec::new(),
        macros: Vec::new(),
        loops: Vec::new(),
        num_loops: 0,
        depth: 0,
        line: 1,
    };
    match renderer.body(&program.body) {
        Ok(_) => Ok(renderer.out.swap_remove(0)),
        Err(fault) => Err((fault, renderer.line)),
    }
}

/// Names visible at one place of the text. Scopes end with the renderer: values in them hold macros by index only.
pub(super) struct Scope {
    names: RefCell<HashMap<Name, Value>>,
    parent: Option<Rc<Scope>>,
}

impl Scope {
    pub(super) fn new(parent: Option<Rc<Scope>>) -> Rc<Self> {
        Rc::new(Self { names: RefCell::default(), parent })
    }

    pub(super) fn get(&self, name: &Name) -> Option<Value> {
        let mut scope = self;
        loop {
            if let Some(value) = scope.names.borrow().get(name) {
                return Some(value.clone());
            }
            scope = scope.parent.as_deref()?;
        }
    }

    pub(super) fn set(&self, name: Name, value: Value) {
        self.names.borrow_mut().insert(name, value);
    }
}

pub(super) struct Closure<'p> {
    pub(super) decl: &'p Macro,
    pub(super) scope: Rc<Scope>,
}

pub(super) struct LoopState<'p> {
    pub(super) serial: usize,
    pub(super) node: &'p For,
    pub(super) scope: Rc<Scope>,
    pub(super) items: Vec<Value>,
    pub(super) index: usize,
    pub(super) depth: usize,
    pub(super) last_changed: Option<Vec<Value>>,
}

#[derive(PartialEq)]
pub(super) enum Flow {
    Next,
    Break,
    Continue,
}

pub(super) struct Renderer<'p> {
    pub(super) meter: Meter,
    pub(super) clock: Clock,
    pub(super) namespaces: Vec<IndexMap<Name, Value>>,
    pub(super) scope: Rc<Scope>,
    /// The output, and above it what is being captured.
    pub(super) out: Vec<String>,
    pub(super) macros: Vec<Closure<'p>>,
    pub(super) loops: Vec<LoopState<'p>>,
    pub(super) num_loops: usize,
    pub(super) depth: u32,
    pub(super) line: u32,
}

impl<'p> Renderer<'p> {
    pub(super) fn descend<T>(&mut self, work: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        self.meter.charge(1)?;
        self.depth += 1;
        if self.depth > MAX_CALL_DEPTH {
            return Err(Fault::Limit { what: "levels of calls", limit: u64::from(MAX_CALL_DEPTH) });
        }
        let result = work(self);
        self.depth -= 1;
        result
    }

    pub(super) fn in_scope<T>(&mut self, scope: Rc<Scope>, work: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        let outer = std::mem::replace(&mut self.scope, scope);
        let result = work(self);
        self.scope = outer;
        result
    }

    pub(super) fn inner_scope(&self) -> Rc<Scope> {
        Scope::new(Some(self.scope.clone()))
    }

    pub(super) fn capture(&mut self, work: impl FnOnce(&mut Self) -> Outcome<()>) -> Outcome<String> {
        self.out.push(String::new());
        let result = work(self);
        let text = self.out.pop().unwrap_or_default();
        result.map(|()| text)
    }

    pub(super) fn write(&mut self, value: &Value) -> Outcome<()> {
        let Some(out) = self.out.last_mut() else { return Ok(()) };
        write_str(value, out, &mut self.meter)?;
        Self::check_output(out)
    }

    pub(super) fn write_raw(&mut self, text: &str) -> Outcome<()> {
        self.meter.charge_bytes(text.len())?;
        let Some(out) = self.out.last_mut() else { return Ok(()) };
        out.push_str(text);
        Self::check_output(out)
    }

    /// One write is bounded by the meter, so checking after it bounds memory too.
    fn check_output(out: &str) -> Outcome<()> {
        if out.len() > MAX_OUTPUT_BYTES {
            return Err(Fault::Limit { what: "bytes of output", limit: MAX_OUTPUT_BYTES as u64 });
        }
        Ok(())
    }

    pub(super) fn eval(&mut self, expr: &'p Expr) -> Outcome<Value> {
        match &expr.kind {
            ExprKind::Const(value) => {
                self.meter.charge(1)?;
                Ok(value.clone())
            }
            ExprKind::Name(name) => {
                self.meter.charge(1)?;
                Ok(self.scope.get(name).unwrap_or_else(|| Value::Undefined(name.clone())))
            }
            _ => self.descend(|r| r.eval_node(expr)),
        }
    }

    pub(super) fn eval_all(&mut self, items: &'p [Expr]) -> Outcome<Vec<Value>> {
        items.iter().map(|item| self.eval(item)).collect()
    }

    fn eval_node(&mut self, expr: &'p Expr) -> Outcome<Value> {
        match &expr.kind {
            ExprKind::Const(_) | ExprKind::Name(_) => self.eval(expr),
            ExprKind::List(items) => Value::list(self.eval_all(items)?),
            ExprKind::Tuple(items) => Value::tuple(self.eval_all(items)?),
            ExprKind::Dict(pairs) => self.eval_dict(pairs),
            ExprKind::Attr(object, name) => {
                let object = self.eval(object)?;
                self.attr(&object, name)
            }
            ExprKind::Item(object, index) => self.eval_item(object, index),
            ExprKind::Slice(object, bounds) => {
                let object = self.eval(object)?;
                let mut values = [Value::None, Value::None, Value::None];
                for (value, bound) in values.iter_mut().zip(bounds) {
                    if let Some(bound) = bound {
                        *value = self.eval(bound)?;
                    }
                }
                ops::slice(&object, values, &mut self.meter)
            }
            ExprKind::Call(..) => self.eval_call(expr, None),
            ExprKind::Filter(value, call) => {
                let value = self.eval(value)?;
                let args = self.args(&call.args)?;
                filters::apply(self, &call.name, value, args)
            }
            ExprKind::Test { value, name, args, negated } => {
                let value = self.eval(value)?;
                let args = self.args(args)?;
                Ok(Value::Bool(predicates::holds(name, &value, args, &mut self.meter)? != *negated))
            }
            ExprKind::Not(value) => Ok(Value::Bool(!self.eval(value)?.is_true())),
            ExprKind::Neg(value) => negate(self.eval(value)?.defined()?),
            ExprKind::Pos(value) => self.eval(value)?.defined(),
            ExprKind::Binary(op, left, right) => {
                let left = self.eval(left)?;
                let right = self.eval(right)?;
                ops::binary(*op, left, right, &mut self.meter)
            }
            ExprKind::Concat(items) => {
                let mut text = String::new();
                for value in self.eval_all(items)? {
                    write_str(&value, &mut text, &mut self.meter)?;
                }
                Ok(Value::from(text))
            }
            ExprKind::And(items) => self.first_where(items, |v| !v.is_true()),
            ExprKind::Or(items) => self.first_where(items, Value::is_true),
            ExprKind::Compare(first, rest) => self.eval_compare(first, rest),
            ExprKind::If { test, then, otherwise } => match (self.eval(test)?.is_true(), otherwise) {
                (true, _) => self.eval(then),
                (false, Some(otherwise)) => self.eval(otherwise),
                (false, None) => Ok(Value::Undefined(Name::from("the value of an if without else"))),
            },
        }
    }

    /// Python's `and` and `or`: the first operand that decides, else the last.
    fn first_where(&mut self, items: &'p [Expr], decides: fn(&Value) -> bool) -> Outcome<Value> {
        let mut value = Value::None;
        for item in items {
            value = self.eval(item)?;
            if decides(&value) {
                break;
            }
        }
        Ok(value)
    }

    fn eval_compare(&mut self, first: &'p Expr, rest: &'p [(CompareOp, Expr)]) -> Outcome<Value> {
        let mut left = self.eval(first)?;
        for (op, right) in rest {
            let right = self.eval(right)?;
            if !ops::compare(*op, &left, &right, &mut self.meter)? {
                return Ok(Value::Bool(false));
            }
            left = right;
        }
        Ok(Value::Bool(true))
    }

    fn eval_dict(&mut self, pairs: &'p [(Expr, Expr)]) -> Outcome<Value> {
        let mut entries = IndexMap::with_capacity(pairs.len());
        for (key, value) in pairs {
            let key = self.eval(key)?.as_key()?;
            entries.insert(key, self.eval(value)?);
        }
        Value::dict(entries)
    }

    fn eval_item(&mut self, object: &'p Expr, index: &'p Expr) -> Outcome<Value> {
        let object = self.eval(object)?;
        let index = self.eval(index)?;
        if let Some(value) = ops::item(&object, &index, &mut self.meter)? {
            return Ok(value);
        }
        match &index {
            Value::Str(name) if !matches!(object, Value::Dict(_)) => self.attr(&object, name),
            Value::Str(name) => Ok(Value::Undefined(name.clone())),
            _ => {
                object.defined()?;
                Ok(Value::Undefined(Name::from("the item of an index out of range")))
            }
        }
    }

    /// `object.name`: a method, else an entry, else undefined.
    pub(super) fn attr(&mut self, object: &Value, name: &Name) -> Outcome<Value> {
        if methods::exists(object, name) {
            return Value::method(object.clone(), name.clone());
        }
        let found = match object {
            Value::Undefined(what) => return Fault::invalid(format!("'{what}' is undefined")),
            Value::Dict(dict) => dict.entries.get(&Key::Str(name.clone())).cloned(),
            Value::Namespace(id) => self.namespaces[*id].get(name).cloned(),
            Value::Loop(serial) => self.loop_attr(*serial, name),
            _ => None,
        };
        Ok(found.unwrap_or_else(|| Value::Undefined(name.clone())))
    }
}

fn negate(value: Value) -> Outcome<Value> {
    match (&value, value.as_int()) {
        (Value::Float(f), _) => Ok(Value::Float(-f)),
        (_, Some(i)) => Ok(Value::Int(i.saturating_neg())),
        _ => Fault::invalid(format!("a {} cannot be negated", value.type_name())),
    }
}
