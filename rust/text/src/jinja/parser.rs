//! Tokens → tree, by Jinja2's own grammar (its precedences, its tuples, its optional `else`).

use std::sync::Arc;

use super::Program;
use super::ast::{Arg, BinaryOp, CompareOp, Expr, ExprKind, FilterCall, For, Macro, Name, Stmt, StmtKind, Target};
use super::lexer::{Token, tokenize};
use super::meter::{Fault, Outcome};
use super::value::Value;

/// Longest template that is read; the longest known in use are about 30 kB.
pub(crate) const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Highest expression tree and deepest nesting of tags and brackets.
const MAX_HEIGHT: u32 = 100;

/// Parses a template; a fault comes with its line.
pub(crate) fn parse(source: &str) -> Result<Program, (Fault, u32)> {
    if source.len() > MAX_SOURCE_BYTES {
        return Err((Fault::Limit { what: "bytes of template", limit: MAX_SOURCE_BYTES as u64 }, 1));
    }
    let mut parser = Parser { tokens: tokenize(source)?, pos: 0, nesting: 0, loops: 0 };
    match parser.body(&[]) {
        Ok(body) => Ok(Program { body }),
        Err(fault) => Err((fault, parser.line())),
    }
}

struct Parser {
    tokens: Vec<(Token, u32)>,
    pos: usize,
    nesting: u32,
    loops: u32,
}

impl Parser {
    fn line(&self) -> u32 {
        self.tokens.get(self.pos).or(self.tokens.last()).map_or(1, |t| t.1)
    }

    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.pos).map(|t| &t.0)
    }

    fn next(&mut self) -> Option<Token> {
        let token = self.peek().cloned();
        self.pos += 1;
        token
    }

    fn skip_op(&mut self, op: &str) -> bool {
        let hit = matches!(self.peek(), Some(Token::Op(o)) if *o == op);
        self.pos += usize::from(hit);
        hit
    }

    fn skip_name(&mut self, name: &str) -> bool {
        let hit = self.at_name(name);
        self.pos += usize::from(hit);
        hit
    }

    fn at_name(&self, name: &str) -> bool {
        matches!(self.peek(), Some(Token::Name(n)) if &**n == name)
    }

    fn unexpected<T>(&self, wanted: &str) -> Outcome<T> {
        let found = match self.peek() {
            None => "the end of the template".to_owned(),
            Some(Token::Data(_)) => "text".to_owned(),
            Some(Token::VarBegin | Token::BlockBegin) => "the beginning of a tag".to_owned(),
            Some(Token::VarEnd | Token::BlockEnd) => "the end of the tag".to_owned(),
            Some(Token::Name(name)) => format!("'{}'", name.chars().take(60).collect::<String>()),
            Some(Token::Str(_)) => "a string".to_owned(),
            Some(Token::Int(_) | Token::Float(_)) => "a number".to_owned(),
            Some(Token::Op(op)) => format!("'{op}'"),
        };
        Fault::invalid(format!("expected {wanted}, found {found}"))
    }

    fn expect_op(&mut self, op: &str) -> Outcome<()> {
        if self.skip_op(op) { Ok(()) } else { self.unexpected(&format!("'{op}'")) }
    }

    fn expect_name(&mut self) -> Outcome<Name> {
        match self.peek() {
            Some(Token::Name(name)) => {
                let name = name.clone();
                self.pos += 1;
                Ok(name)
            }
            _ => self.unexpected("a name"),
        }
    }

    fn expect_block_end(&mut self) -> Outcome<()> {
        if matches!(self.peek(), Some(Token::BlockEnd)) {
            self.pos += 1;
            Ok(())
        } else {
            self.unexpected("'%}'")
        }
    }

    fn nested<T>(&mut self, parse: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        self.nesting += 1;
        if self.nesting > MAX_HEIGHT {
            return Err(too_high());
        }
        let result = parse(self);
        self.nesting -= 1;
        result
    }

    // --- statements ---

    /// Statements up to, not including, a tag named in `ends`; the tag's `{%` and name are consumed.
    fn body(&mut self, ends: &[&str]) -> Outcome<Vec<Stmt>> {
        self.nested(|p| p.body_inner(ends))
    }

    fn body_inner(&mut self, ends: &[&str]) -> Outcome<Vec<Stmt>> {
        let mut body = Vec::new();
        loop {
            let line = self.line();
            match self.next() {
                None if ends.is_empty() => return Ok(body),
                None => return Fault::invalid(format!("expected '{{% {} %}}' before the end", ends.join(" / "))),
                Some(Token::Data(text)) => body.push(Stmt { line, kind: StmtKind::Raw(text) }),
                Some(Token::VarBegin) => {
                    let kind = StmtKind::Emit(self.tuple(true)?);
                    if !matches!(self.next(), Some(Token::VarEnd)) {
                        self.pos -= 1;
                        return self.unexpected("'}}'");
                    }
                    body.push(Stmt { line, kind });
                }
                Some(Token::BlockBegin) => {
                    if let Some(Token::Name(name)) = self.peek()
                        && ends.contains(&&**name)
                    {
                        return Ok(body);
                    }
                    self.statement(line, &mut body)?;
                }
                Some(_) => {
                    self.pos -= 1;
                    return self.unexpected("text or a tag");
                }
            }
        }
    }

    /// The body of a tag, and its end tag.
    fn block(&mut self, end: &str) -> Outcome<Vec<Stmt>> {
        self.expect_block_end()?;
        let body = self.body(&[end])?;
        self.pos += 1;
        self.expect_block_end()?;
        Ok(body)
    }

    fn statement(&mut self, line: u32, body: &mut Vec<Stmt>) -> Outcome<()> {
        let tag = self.expect_name()?;
        let kind = match &*tag {
            "for" => self.for_loop()?,
            "if" => self.if_chain()?,
            "set" => self.set()?,
            "with" => self.with()?,
            "macro" => {
                let name = self.expect_name()?;
                StmtKind::Macro(self.macro_rest(name, "endmacro")?)
            }
            "call" => self.call_block()?,
            "filter" => {
                let filters = self.filter_chain()?;
                StmtKind::FilterBlock { filters, body: self.block("endfilter")? }
            }
            "generation" => StmtKind::With { bindings: Vec::new(), body: self.block("endgeneration")? },
            "break" | "continue" if self.loops == 0 => return Fault::invalid(format!("'{tag}' outside a loop")),
            "break" => self.tag_end(StmtKind::Break)?,
            "continue" => self.tag_end(StmtKind::Continue)?,
            other => return Fault::invalid(format!("tag '{other}' is unknown here")),
        };
        body.push(Stmt { line, kind });
        Ok(())
    }

    fn tag_end(&mut self, kind: StmtKind) -> Outcome<StmtKind> {
        self.expect_block_end()?;
        Ok(kind)
    }

    fn for_loop(&mut self) -> Outcome<StmtKind> {
        let target = self.target(false)?;
        if !self.skip_name("in") {
            return self.unexpected("'in'");
        }
        let iter = self.tuple(false)?;
        let filter = if self.skip_name("if") { Some(self.expr()?) } else { None };
        let recursive = self.skip_name("recursive");
        self.expect_block_end()?;
        self.loops += 1;
        let body = self.body(&["else", "endfor"])?;
        self.loops -= 1;
        let mut otherwise = Vec::new();
        if self.skip_name("else") {
            self.expect_block_end()?;
            otherwise = self.body(&["endfor"])?;
        }
        self.pos += 1;
        self.tag_end(StmtKind::For(For { target, iter, filter, recursive, body, otherwise }))
    }

    fn if_chain(&mut self) -> Outcome<StmtKind> {
        let mut branches = Vec::new();
        let mut test = Some(self.tuple(false)?);
        loop {
            self.expect_block_end()?;
            let ends: &[&str] = if test.is_some() { &["elif", "else", "endif"] } else { &["endif"] };
            let body = self.body(ends)?;
            branches.push((test.take(), body));
            if self.skip_name("elif") {
                test = Some(self.tuple(false)?);
            } else if !self.skip_name("else") {
                self.pos += 1;
                return self.tag_end(StmtKind::If(branches));
            }
        }
    }

    fn set(&mut self) -> Outcome<StmtKind> {
        let target = self.target(true)?;
        if self.skip_op("=") {
            let value = self.tuple(true)?;
            return self.tag_end(StmtKind::Set { target, value });
        }
        let filters = if self.skip_op("|") { self.filter_chain()? } else { Vec::new() };
        Ok(StmtKind::SetBlock { target, filters, body: self.block("endset")? })
    }

    fn with(&mut self) -> Outcome<StmtKind> {
        let mut bindings = Vec::new();
        while !matches!(self.peek(), Some(Token::BlockEnd)) {
            if !bindings.is_empty() {
                self.expect_op(",")?;
            }
            let target = Target::Name(self.expect_name()?);
            self.expect_op("=")?;
            bindings.push((target, self.expr()?));
        }
        Ok(StmtKind::With { bindings, body: self.block("endwith")? })
    }

    fn macro_rest(&mut self, name: Name, end: &str) -> Outcome<Macro> {
        let params =
            if name.is_empty() && !matches!(self.peek(), Some(Token::Op("("))) { Vec::new() } else { self.params()? };
        let loops = std::mem::take(&mut self.loops);
        let body = self.block(end)?;
        self.loops = loops;
        Ok(Macro { name, params, body })
    }

    fn params(&mut self) -> Outcome<Vec<(Name, Option<Expr>)>> {
        self.expect_op("(")?;
        let mut params: Vec<(Name, Option<Expr>)> = Vec::new();
        while !self.skip_op(")") {
            if !params.is_empty() {
                self.expect_op(",")?;
            }
            let name = self.expect_name()?;
            let default = if self.skip_op("=") { Some(self.expr()?) } else { None };
            if default.is_none() && params.last().is_some_and(|p| p.1.is_some()) {
                return Fault::invalid(format!("parameter '{name}' without a default follows one with a default"));
            }
            params.push((name, default));
        }
        Ok(params)
    }

    fn call_block(&mut self) -> Outcome<StmtKind> {
        let params = if matches!(self.peek(), Some(Token::Op("("))) { self.params()? } else { Vec::new() };
        let call = self.expr()?;
        if !matches!(call.kind, ExprKind::Call(..)) {
            return Fault::invalid("'call' needs a call");
        }
        let mut caller = self.macro_rest(Arc::from(""), "endcall")?;
        caller.name = Arc::from("caller");
        caller.params = params;
        Ok(StmtKind::CallBlock { call, caller })
    }

    /// `name(args) | name …`
    fn filter_chain(&mut self) -> Outcome<Vec<FilterCall>> {
        let mut filters = vec![self.filter_call()?];
        while self.skip_op("|") {
            filters.push(self.filter_call()?);
        }
        Ok(filters)
    }

    fn filter_call(&mut self) -> Outcome<FilterCall> {
        let name = self.expect_name()?;
        let args = if matches!(self.peek(), Some(Token::Op("("))) { self.args()? } else { Vec::new() };
        Ok(FilterCall { name, args })
    }

    fn target(&mut self, attributes: bool) -> Outcome<Target> {
        let first = self.target_item(attributes)?;
        if !matches!(self.peek(), Some(Token::Op(","))) {
            return Ok(first);
        }
        let mut items = vec![first];
        while self.skip_op(",") {
            if !matches!(self.peek(), Some(Token::Name(_) | Token::Op("("))) || self.at_name("in") {
                break;
            }
            items.push(self.target_item(false)?);
        }
        Ok(Target::Tuple(items))
    }

    fn target_item(&mut self, attributes: bool) -> Outcome<Target> {
        if self.skip_op("(") {
            let inner = self.nested(|p| p.target(false))?;
            self.expect_op(")")?;
            return Ok(inner);
        }
        let name = self.expect_name()?;
        if attributes && self.skip_op(".") {
            return Ok(Target::Attr(name, self.expect_name()?));
        }
        Ok(Target::Name(name))
    }

    // --- expressions, loosest first ---

    fn build(&self, height: u32, kind: ExprKind) -> Outcome<Expr> {
        if height >= MAX_HEIGHT { Err(too_high()) } else { Ok(Expr { kind, height: height + 1 }) }
    }

    /// One expression, or several with commas between them: a tuple.
    fn tuple(&mut self, with_condition: bool) -> Outcome<Expr> {
        let first = if with_condition { self.expr()? } else { self.nested(Self::or)? };
        if !matches!(self.peek(), Some(Token::Op(","))) {
            return Ok(first);
        }
        let mut items = vec![first];
        while self.skip_op(",") {
            if matches!(self.peek(), Some(Token::VarEnd | Token::BlockEnd | Token::Op(")" | "]")) | None) {
                break;
            }
            items.push(self.expr()?);
        }
        self.build(highest(&items), ExprKind::Tuple(items))
    }

    fn expr(&mut self) -> Outcome<Expr> {
        self.nested(|p| {
            let mut expr = p.or()?;
            while p.skip_name("if") {
                let test = p.or()?;
                let otherwise = if p.skip_name("else") { Some(Box::new(p.expr()?)) } else { None };
                let height = expr.height.max(test.height).max(otherwise.as_ref().map_or(0, |o| o.height));
                expr = p.build(height, ExprKind::If { test: Box::new(test), then: Box::new(expr), otherwise })?;
            }
            Ok(expr)
        })
    }

    fn or(&mut self) -> Outcome<Expr> {
        let mut items = vec![self.and()?];
        while self.skip_name("or") {
            items.push(self.and()?);
        }
        self.chain(items, ExprKind::Or)
    }

    fn and(&mut self) -> Outcome<Expr> {
        let mut items = vec![self.not()?];
        while self.skip_name("and") {
            items.push(self.not()?);
        }
        self.chain(items, ExprKind::And)
    }

    /// A flat node for a run of one operator: long runs are common (`a ~ b ~ c …`) and must not grow the tree.
    fn chain(&self, mut items: Vec<Expr>, kind: fn(Vec<Expr>) -> ExprKind) -> Outcome<Expr> {
        match items.pop() {
            Some(only) if items.is_empty() => Ok(only),
            Some(last) => {
                items.push(last);
                self.build(highest(&items), kind(items))
            }
            None => self.unexpected("an expression"),
        }
    }

    fn not(&mut self) -> Outcome<Expr> {
        if self.skip_name("not") {
            let inner = self.nested(Self::not)?;
            return self.build(inner.height, ExprKind::Not(Box::new(inner)));
        }
        self.compare()
    }

    fn compare(&mut self) -> Outcome<Expr> {
        let first = self.math1()?;
        let mut rest = Vec::new();
        let mut height = first.height;
        loop {
            let op = match self.peek() {
                Some(Token::Op("==")) => CompareOp::Eq,
                Some(Token::Op("!=")) => CompareOp::Ne,
                Some(Token::Op("<")) => CompareOp::Lt,
                Some(Token::Op("<=")) => CompareOp::Le,
                Some(Token::Op(">")) => CompareOp::Gt,
                Some(Token::Op(">=")) => CompareOp::Ge,
                Some(Token::Name(n)) if &**n == "in" => CompareOp::In,
                Some(Token::Name(n)) if &**n == "not" => {
                    if !matches!(self.tokens.get(self.pos + 1), Some((Token::Name(n), _)) if &**n == "in") {
                        break;
                    }
                    self.pos += 1;
                    CompareOp::NotIn
                }
                _ => break,
            };
            self.pos += 1;
            let right = self.math1()?;
            height = height.max(right.height);
            rest.push((op, right));
        }
        if rest.is_empty() { Ok(first) } else { self.build(height, ExprKind::Compare(Box::new(first), rest)) }
    }

    fn binary(&mut self, next: fn(&mut Self) -> Outcome<Expr>, ops: &[(&str, BinaryOp)]) -> Outcome<Expr> {
        let mut left = next(self)?;
        while let Some(&(_, op)) = ops.iter().find(|(symbol, _)| self.skip_op(symbol)) {
            let right = next(self)?;
            let height = left.height.max(right.height);
            left = self.build(height, ExprKind::Binary(op, Box::new(left), Box::new(right)))?;
        }
        Ok(left)
    }

    fn math1(&mut self) -> Outcome<Expr> {
        self.binary(Self::concat, &[("+", BinaryOp::Add), ("-", BinaryOp::Sub)])
    }

    fn concat(&mut self) -> Outcome<Expr> {
        let mut items = vec![self.math2()?];
        while self.skip_op("~") {
            items.push(self.math2()?);
        }
        self.chain(items, ExprKind::Concat)
    }

    fn math2(&mut self) -> Outcome<Expr> {
        let ops = [("*", BinaryOp::Mul), ("/", BinaryOp::Div), ("//", BinaryOp::FloorDiv), ("%", BinaryOp::Rem)];
        self.binary(Self::pow, &ops)
    }

    fn pow(&mut self) -> Outcome<Expr> {
        self.binary(|p| p.unary(true), &[("**", BinaryOp::Pow)])
    }

    fn unary(&mut self, with_filter: bool) -> Outcome<Expr> {
        let sign = if self.skip_op("-") {
            Some(ExprKind::Neg as fn(Box<Expr>) -> ExprKind)
        } else if self.skip_op("+") {
            Some(ExprKind::Pos as fn(Box<Expr>) -> ExprKind)
        } else {
            None
        };
        let mut expr = match sign {
            Some(kind) => {
                let inner = self.nested(|p| p.unary(false))?;
                self.build(inner.height, kind(Box::new(inner)))?
            }
            None => self.primary()?,
        };
        expr = self.postfix(expr)?;
        if with_filter { self.filters_and_tests(expr) } else { Ok(expr) }
    }

    fn primary(&mut self) -> Outcome<Expr> {
        let token = self.next();
        let kind = match token {
            Some(Token::Name(name)) => match &*name {
                "true" | "True" => ExprKind::Const(Value::Bool(true)),
                "false" | "False" => ExprKind::Const(Value::Bool(false)),
                "none" | "None" => ExprKind::Const(Value::None),
                _ => ExprKind::Name(name),
            },
            Some(Token::Str(mut text)) => {
                while let Some(Token::Str(more)) = self.peek() {
                    text.push_str(more);
                    self.pos += 1;
                }
                ExprKind::Const(Value::from(text))
            }
            Some(Token::Int(value)) => ExprKind::Const(Value::Int(value)),
            Some(Token::Float(value)) => ExprKind::Const(Value::Float(value)),
            Some(Token::Op("(")) => return self.nested(Self::parenthesized),
            Some(Token::Op("[")) => {
                let items = self.nested(|p| p.sequence("]", Self::expr))?;
                return self.build(highest(&items), ExprKind::List(items));
            }
            Some(Token::Op("{")) => {
                let pairs = self.nested(|p| p.sequence("}", Self::pair))?;
                let height = pairs.iter().map(|(k, v)| k.height.max(v.height)).max().unwrap_or(0);
                return self.build(height, ExprKind::Dict(pairs));
            }
            _ => {
                self.pos -= 1;
                return self.unexpected("an expression");
            }
        };
        self.build(0, kind)
    }

    fn parenthesized(&mut self) -> Outcome<Expr> {
        if self.skip_op(")") {
            return self.build(0, ExprKind::Tuple(Vec::new()));
        }
        let inner = self.tuple(true)?;
        self.expect_op(")")?;
        Ok(inner)
    }

    fn sequence<T>(&mut self, end: &str, item: fn(&mut Self) -> Outcome<T>) -> Outcome<Vec<T>> {
        let mut items = Vec::new();
        while !self.skip_op(end) {
            if !items.is_empty() {
                self.expect_op(",")?;
                if self.skip_op(end) {
                    break;
                }
            }
            items.push(item(self)?);
        }
        Ok(items)
    }

    fn pair(&mut self) -> Outcome<(Expr, Expr)> {
        let key = self.expr()?;
        self.expect_op(":")?;
        Ok((key, self.expr()?))
    }

    fn postfix(&mut self, mut expr: Expr) -> Outcome<Expr> {
        loop {
            if self.skip_op(".") {
                let height = expr.height;
                let kind = match self.next() {
                    Some(Token::Name(name)) => ExprKind::Attr(Box::new(expr), name),
                    Some(Token::Int(index)) => {
                        let index = self.build(0, ExprKind::Const(Value::Int(index)))?;
                        ExprKind::Item(Box::new(expr), Box::new(index))
                    }
                    _ => return Fault::invalid("expected a name after '.'"),
                };
                expr = self.build(height, kind)?;
            } else if self.skip_op("[") {
                expr = self.nested(|p| p.subscript(expr))?;
            } else if matches!(self.peek(), Some(Token::Op("("))) {
                expr = self.call(expr)?;
            } else {
                return Ok(expr);
            }
        }
    }

    fn subscript(&mut self, expr: Expr) -> Outcome<Expr> {
        let mut bounds = [None, None, None];
        let mut is_slice = false;
        let mut height = expr.height;
        for (i, bound) in bounds.iter_mut().enumerate() {
            if !matches!(self.peek(), Some(Token::Op(":" | "]"))) {
                let value = self.expr()?;
                height = height.max(value.height);
                *bound = Some(Box::new(value));
            }
            if i == 2 || !self.skip_op(":") {
                break;
            }
            is_slice = true;
        }
        self.expect_op("]")?;
        let kind = match bounds {
            bounds if is_slice => ExprKind::Slice(Box::new(expr), bounds),
            [Some(index), _, _] => ExprKind::Item(Box::new(expr), index),
            _ => return Fault::invalid("empty subscript"),
        };
        self.build(height, kind)
    }

    fn call(&mut self, callee: Expr) -> Outcome<Expr> {
        let args = self.args()?;
        let height = callee.height.max(highest_arg(&args));
        self.build(height, ExprKind::Call(Box::new(callee), args))
    }

    fn args(&mut self) -> Outcome<Vec<Arg>> {
        self.expect_op("(")?;
        self.nested(|p| p.sequence(")", Self::arg))
    }

    fn arg(&mut self) -> Outcome<Arg> {
        if self.skip_op("**") {
            return Ok(Arg::KeywordSplat(self.expr()?));
        }
        if self.skip_op("*") {
            return Ok(Arg::Splat(self.expr()?));
        }
        if matches!(self.peek(), Some(Token::Name(_)))
            && matches!(self.tokens.get(self.pos + 1), Some((Token::Op("="), _)))
        {
            let name = self.expect_name()?;
            self.pos += 1;
            return Ok(Arg::Keyword(name, self.expr()?));
        }
        Ok(Arg::Positional(self.expr()?))
    }

    fn filters_and_tests(&mut self, mut expr: Expr) -> Outcome<Expr> {
        loop {
            if self.skip_op("|") {
                let call = self.filter_call()?;
                let height = expr.height.max(highest_arg(&call.args));
                expr = self.build(height, ExprKind::Filter(Box::new(expr), call))?;
            } else if self.skip_name("is") {
                expr = self.test(expr)?;
            } else if matches!(self.peek(), Some(Token::Op("("))) {
                expr = self.call(expr)?;
            } else {
                return Ok(expr);
            }
        }
    }

    fn test(&mut self, value: Expr) -> Outcome<Expr> {
        let negated = self.skip_name("not");
        let name = self.expect_name()?;
        let ends = ["else", "or", "and", "if", "in", "not", "is"];
        let args = match self.peek() {
            Some(Token::Op("(")) => self.args()?,
            Some(Token::Name(n)) if ends.contains(&&**n) => Vec::new(),
            Some(Token::Name(_) | Token::Str(_) | Token::Int(_) | Token::Float(_) | Token::Op("[" | "{")) => {
                let operand = self.primary()?;
                vec![Arg::Positional(self.postfix(operand)?)]
            }
            _ => Vec::new(),
        };
        let height = value.height.max(highest_arg(&args));
        self.build(height, ExprKind::Test { value: Box::new(value), name, args, negated })
    }
}

fn highest(items: &[Expr]) -> u32 {
    items.iter().map(|e| e.height).max().unwrap_or(0)
}

fn highest_arg(args: &[Arg]) -> u32 {
    args.iter()
        .map(|arg| match arg {
            Arg::Positional(e) | Arg::Keyword(_, e) | Arg::Splat(e) | Arg::KeywordSplat(e) => e.height,
        })
        .max()
        .unwrap_or(0)
}

fn too_high() -> Fault {
    Fault::Limit { what: "levels of nesting", limit: u64::from(MAX_HEIGHT) }
}
