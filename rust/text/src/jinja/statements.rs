//! Statements: what writes, binds and branches.

use super::ast::{Expr, FilterCall, Stmt, StmtKind, Target};
use super::eval::{Flow, Renderer};
use super::meter::{Fault, Outcome};
use super::value::Value;
use super::{filters, ops};

impl<'p> Renderer<'p> {
    pub(super) fn body(&mut self, body: &'p [Stmt]) -> Outcome<Flow> {
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

    pub(super) fn assign(&mut self, target: &Target, value: Value) -> Outcome<()> {
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
}
