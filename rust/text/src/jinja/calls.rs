//! Loops, and calls of macros, methods and functions.

use std::collections::VecDeque;
use std::rc::Rc;

use super::args::Args;
use super::ast::{Arg, Expr, ExprKind, For, Macro, Name};
use super::eval::{Closure, Flow, LoopState, Renderer, Scope};
use super::meter::{Fault, Outcome};
use super::value::{Key, Value};
use super::{functions, methods, ops};

impl<'p> Renderer<'p> {
    pub(super) fn for_loop(&mut self, node: &'p For, iter: Value, outer: Rc<Scope>, depth: usize) -> Outcome<()> {
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

    pub(super) fn loop_attr(&self, serial: usize, name: &str) -> Option<Value> {
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

    pub(super) fn close_over(&mut self, decl: &'p Macro) -> Value {
        self.macros.push(Closure { decl, scope: self.scope.clone() });
        Value::Macro(self.macros.len() - 1)
    }

    pub(super) fn args(&mut self, args: &'p [Arg]) -> Outcome<Args> {
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

    pub(super) fn eval_call(&mut self, expr: &'p Expr, caller: Option<Value>) -> Outcome<Value> {
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
}
