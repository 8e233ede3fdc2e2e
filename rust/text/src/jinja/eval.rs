//! Walks the tree: statements write, expressions give values.

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use indexmap::IndexMap;

use super::Program;
use super::args::Args;
use super::ast::{Arg, Expr, ExprKind, FilterCall, For, Macro, Name, Stmt, StmtKind, Target};
use super::functions::{self, Function};
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
struct Scope {
    names: RefCell<HashMap<Name, Value>>,
    parent: Option<Rc<Scope>>,
}

impl Scope {
    fn new(parent: Option<Rc<Scope>>) -> Rc<Self> {
        Rc::new(Self { names: RefCell::default(), parent })
    }

    fn get(&self, name: &Name) -> Option<Value> {
        let mut scope = self;
        loop {
            if let Some(value) = scope.names.borrow().get(name) {
                return Some(value.clone());
            }
            scope = scope.parent.as_deref()?;
        }
    }

    fn set(&self, name: Name, value: Value) {
        self.names.borrow_mut().insert(name, value);
    }
}

struct Closure<'p> {
    decl: &'p Macro,
    scope: Rc<Scope>,
}

struct LoopState<'p> {
    serial: usize,
    node: &'p For,
    scope: Rc<Scope>,
    items: Vec<Value>,
    index: usize,
    depth: usize,
    last_changed: Option<Vec<Value>>,
}

#[derive(PartialEq)]
enum Flow {
    Next,
    Break,
    Continue,
}

pub(super) struct Renderer<'p> {
    pub(super) meter: Meter,
    pub(super) clock: Clock,
    pub(super) namespaces: Vec<IndexMap<Name, Value>>,
    scope: Rc<Scope>,
    /// The output, and above it what is being captured.
    out: Vec<String>,
    macros: Vec<Closure<'p>>,
    loops: Vec<LoopState<'p>>,
    num_loops: usize,
    depth: u32,
    line: u32,
}

impl<'p> Renderer<'p> {
    fn descend<T>(&mut self, work: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        self.meter.charge(1)?;
        self.depth += 1;
        if self.depth > MAX_CALL_DEPTH {
            return Err(Fault::Limit { what: "levels of calls", limit: u64::from(MAX_CALL_DEPTH) });
        }
        let result = work(self);
        self.depth -= 1;
        result
    }

    fn in_scope<T>(&mut self, scope: Rc<Scope>, work: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        let outer = std::mem::replace(&mut self.scope, scope);
        let result = work(self);
        self.scope = outer;
        result
    }

    fn inner_scope(&self) -> Rc<Scope> {
        Scope::new(Some(self.scope.clone()))
    }

    fn capture(&mut self, work: impl FnOnce(&mut Self) -> Outcome<()>) -> Outcome<String> {
        self.out.push(String::new());
        let result = work(self);
        let text = self.out.pop().unwrap_or_default();
        result.map(|()| text)
    }

    fn write(&mut self, value: &Value) -> Outcome<()> {
        let Some(out) = self.out.last_mut() else { return Ok(()) };
        write_str(value, out, &mut self.meter)?;
        Self::check_output(out)
    }

    fn write_raw(&mut self, text: &str) -> Outcome<()> {
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

    // --- statements ---

    fn body(&mut self, body: &'p [Stmt]) -> Outcome<Flow> {
        for stmt in body {
            self.line = stmt.line;
            let flow = self.descend(|r| r.statement(stmt))?;
            if flow != Flow::Next {
                return Ok(flow);
            }
        }
        Ok(Flow::Next)
    }

    fn statement(&mut self, stmt: &'p Stmt) -> Outcome<Flow> {
        match &stmt.kind {
            StmtKind::Raw(text) => self.write_raw(text)?,
            StmtKind::Emit(expr) => {
                let value = self.eval(expr)?;
                self.write(&value)?;
            }
            StmtKind::For(node) => {
                let iter = self.eval(&node.iter)?;
                let scope = self.scope.clone();
                self.for_loop(node, iter, scope, 0)?;
            }
            StmtKind::If(branches) => {
                for (test, body) in branches {
                    let taken = match test {
                        Some(test) => self.eval(test)?.is_true(),
                        None => true,
                    };
                    if taken {
                        return self.body(body);
                    }
                }
            }
            StmtKind::Set { target, value } => {
                let value = self.eval(value)?;
                self.assign(target, value)?;
            }
            StmtKind::SetBlock { target, filters, body } => {
                let text = self.captured_block(filters, body)?;
                self.assign(target, text)?;
            }
            StmtKind::FilterBlock { filters, body } => {
                let text = self.captured_block(filters, body)?;
                self.write(&text)?;
            }
            StmtKind::With { bindings, body } => return self.with(bindings, body),
            StmtKind::Macro(decl) => {
                let value = self.close_over(decl);
                self.scope.set(decl.name.clone(), value);
            }
            StmtKind::CallBlock { call, caller } => {
                let caller = self.close_over(caller);
                let value = self.eval_call(call, Some(caller))?;
                self.write(&value)?;
            }
            StmtKind::Break => return Ok(Flow::Break),
            StmtKind::Continue => return Ok(Flow::Continue),
        }
        Ok(Flow::Next)
    }

    fn with(&mut self, bindings: &'p [(Target, Expr)], body: &'p [Stmt]) -> Outcome<Flow> {
        let mut values = Vec::with_capacity(bindings.len());
        for (_, value) in bindings {
            values.push(self.eval(value)?);
        }
        let scope = self.inner_scope();
        self.in_scope(scope, |r| {
            for ((target, _), value) in bindings.iter().zip(values) {
                r.assign(target, value)?;
            }
            r.body(body)
        })
    }

    fn captured_block(&mut self, filters: &'p [FilterCall], body: &'p [Stmt]) -> Outcome<Value> {
        let scope = self.inner_scope();
        let text = self.in_scope(scope, |r| r.capture(|r| r.body(body).map(|_| ())))?;
        let mut value = Value::from(text);
        for call in filters {
            let args = self.args(&call.args)?;
            value = filters::apply(self, &call.name, value, args)?;
        }
        Ok(value)
    }

    fn assign(&mut self, target: &Target, value: Value) -> Outcome<()> {
        match target {
            Target::Name(name) => self.scope.set(name.clone(), value),
            Target::Attr(object, name) => match self.scope.get(object) {
                Some(Value::Namespace(id)) if name.starts_with('_') => {
                    let _ = id;
                    return Fault::invalid(format!("namespace attribute '{name}' may not begin with '_'"));
                }
                Some(Value::Namespace(id)) => {
                    self.namespaces[id].insert(name.clone(), value);
                }
                _ => return Fault::invalid(format!("cannot set '{object}.{name}': '{object}' is no namespace")),
            },
            Target::Tuple(targets) => {
                let items = ops::iterate(&value.defined()?, &mut self.meter)?;
                if items.len() != targets.len() {
                    return Fault::invalid(format!(
                        "cannot unpack {} values into {} names",
                        items.len(),
                        targets.len()
                    ));
                }
                for (target, item) in targets.iter().zip(items) {
                    self.assign(target, item)?;
                }
            }
        }
        Ok(())
    }

    // --- loops ---

    fn for_loop(&mut self, node: &'p For, iter: Value, outer: Rc<Scope>, depth: usize) -> Outcome<()> {
        let mut items = ops::iterate(&iter, &mut self.meter)?;
        if let Some(filter) = &node.filter {
            let mut kept = Vec::new();
            for item in items {
                let scope = Scope::new(Some(outer.clone()));
                let keep = self.in_scope(scope, |r| {
                    r.assign(&node.target, item.clone())?;
                    r.eval(filter)
                })?;
                if keep.is_true() {
                    kept.push(item);
                }
            }
            items = kept;
        }
        if items.is_empty() {
            return self.in_scope(Scope::new(Some(outer)), |r| r.body(&node.otherwise)).map(|_| ());
        }
        let serial = self.num_loops;
        self.num_loops += 1;
        let num_items = items.len();
        self.loops.push(LoopState { serial, node, scope: outer.clone(), items, index: 0, depth, last_changed: None });
        let at = self.loops.len() - 1;
        for index in 0..num_items {
            self.meter.charge(1)?;
            self.loops[at].index = index;
            let item = self.loops[at].items[index].clone();
            let flow = self.in_scope(Scope::new(Some(outer.clone())), |r| {
                r.scope.set(Name::from("loop"), Value::Loop(serial));
                r.assign(&node.target, item)?;
                r.body(&node.body)
            })?;
            if flow == Flow::Break {
                break;
            }
        }
        self.loops.truncate(at);
        Ok(())
    }

    fn running(&self, serial: usize) -> Option<usize> {
        self.loops.iter().rposition(|l| l.serial == serial)
    }

    fn loop_attr(&self, serial: usize, name: &str) -> Option<Value> {
        let state = &self.loops[self.running(serial)?];
        let len = state.items.len();
        Some(match name {
            "index" => (state.index + 1).into(),
            "index0" => state.index.into(),
            "revindex" => (len - state.index).into(),
            "revindex0" => (len - state.index - 1).into(),
            "first" => Value::Bool(state.index == 0),
            "last" => Value::Bool(state.index + 1 == len),
            "length" => len.into(),
            "depth" => (state.depth + 1).into(),
            "depth0" => state.depth.into(),
            "previtem" => state.items.get(state.index.checked_sub(1)?)?.clone(),
            "nextitem" => state.items.get(state.index + 1)?.clone(),
            _ => return None,
        })
    }

    /// `loop.cycle(…)`, `loop.changed(…)`; `None` when there is no such method.
    fn loop_method(&mut self, serial: usize, name: &str, args: &Args) -> Outcome<Option<Value>> {
        let Some(at) = self.running(serial) else { return Ok(None) };
        match name {
            "cycle" if !args.positional.is_empty() => {
                let index = self.loops[at].index % args.positional.len();
                Ok(args.positional.get(index).cloned())
            }
            "changed" => {
                let now = Vec::from(args.positional.clone());
                let same = match &self.loops[at].last_changed {
                    Some(last) => ops::equal(&Value::list(last.clone())?, &Value::list(now.clone())?, &mut self.meter)?,
                    None => false,
                };
                self.loops[at].last_changed = Some(now);
                Ok(Some(Value::Bool(!same)))
            }
            _ => Ok(None),
        }
    }

    // --- calls ---

    fn close_over(&mut self, decl: &'p Macro) -> Value {
        self.macros.push(Closure { decl, scope: self.scope.clone() });
        Value::Macro(self.macros.len() - 1)
    }

    fn args(&mut self, args: &'p [Arg]) -> Outcome<Args> {
        let mut positional = VecDeque::with_capacity(args.len());
        let mut keyword: Vec<(Name, Value)> = Vec::new();
        for arg in args {
            match arg {
                Arg::Positional(expr) => positional.push_back(self.eval(expr)?),
                Arg::Keyword(name, expr) => keyword.push((name.clone(), self.eval(expr)?)),
                Arg::Splat(expr) => {
                    let value = self.eval(expr)?.defined()?;
                    positional.extend(ops::iterate(&value, &mut self.meter)?);
                }
                Arg::KeywordSplat(expr) => match self.eval(expr)? {
                    Value::Dict(dict) => {
                        self.meter.charge(dict.entries.len())?;
                        for (key, value) in &dict.entries {
                            let Key::Str(name) = key else { return Fault::invalid("keywords must be strings") };
                            keyword.push((name.clone(), value.clone()));
                        }
                    }
                    other => return Fault::invalid(format!("'**' needs a dict, not {}", other.type_name())),
                },
            }
        }
        Ok(Args { positional, keyword })
    }

    fn eval_call(&mut self, expr: &'p Expr, caller: Option<Value>) -> Outcome<Value> {
        let ExprKind::Call(callee, args) = &expr.kind else { return Fault::invalid("'call' needs a call") };
        if let ExprKind::Attr(object, name) = &callee.kind {
            let object = self.eval(object)?;
            let mut args = self.args(args)?;
            if let Value::Loop(serial) = object
                && let Some(value) = self.loop_method(serial, name, &args)?
            {
                return Ok(value);
            }
            if methods::exists(&object, name) {
                return methods::call(&object, name, args, &mut self.meter);
            }
            args.keyword.extend(caller.map(|c| (Name::from("caller"), c)));
            let function = self.attr(&object, name)?;
            return self.call(function, args);
        }
        let function = self.eval(callee)?;
        let mut args = self.args(args)?;
        args.keyword.extend(caller.map(|c| (Name::from("caller"), c)));
        self.call(function, args)
    }

    fn call(&mut self, function: Value, args: Args) -> Outcome<Value> {
        match function {
            Value::Function(function) => functions::call(self, function, args),
            Value::Macro(id) => self.descend(|r| r.call_macro(id, args)),
            Value::Method(method) => methods::call(&method.0, &method.1, args, &mut self.meter),
            Value::Loop(serial) => self.descend(|r| r.recurse(serial, args)),
            other => {
                let other = other.defined()?;
                Fault::invalid(format!("a {} cannot be called", other.type_name()))
            }
        }
    }

    fn call_macro(&mut self, id: usize, mut args: Args) -> Outcome<Value> {
        let decl = self.macros[id].decl;
        let scope = Scope::new(Some(self.macros[id].scope.clone()));
        let text = self.in_scope(scope, |r| {
            if let Some(caller) = args.named("caller") {
                r.scope.set(Name::from("caller"), caller);
            }
            for (name, default) in &decl.params {
                let value = match (args.next(name), default) {
                    (Some(value), _) => value,
                    (None, Some(default)) => r.eval(default)?,
                    (None, None) => Value::Undefined(name.clone()),
                };
                r.scope.set(name.clone(), value);
            }
            r.scope.set(Name::from("varargs"), Value::tuple(args.positional.drain(..).collect())?);
            let rest = args.keyword.drain(..).map(|(name, value)| (Key::Str(name), value)).collect();
            r.scope.set(Name::from("kwargs"), Value::dict(rest)?);
            r.capture(|r| r.body(&decl.body).map(|_| ()))
        })?;
        Ok(Value::from(text))
    }

    /// `loop(children)` in a recursive loop: the loop again, one level down.
    fn recurse(&mut self, serial: usize, mut args: Args) -> Outcome<Value> {
        let Some(at) = self.running(serial) else { return Fault::invalid("'loop' called outside its loop") };
        let state = &self.loops[at];
        let (node, scope, depth) = (state.node, state.scope.clone(), state.depth + 1);
        if !node.recursive {
            return Fault::invalid("'loop' called in a loop that is not marked 'recursive'");
        }
        let items = args.require("iterable")?;
        args.finish()?;
        Ok(Value::from(self.capture(|r| r.for_loop(node, items, scope, depth))?))
    }

    // --- expressions ---

    fn eval(&mut self, expr: &'p Expr) -> Outcome<Value> {
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

    fn eval_all(&mut self, items: &'p [Expr]) -> Outcome<Vec<Value>> {
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

    fn eval_compare(&mut self, first: &'p Expr, rest: &'p [(super::ast::CompareOp, Expr)]) -> Outcome<Value> {
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
