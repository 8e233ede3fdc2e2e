//! Tokens → tree, by Jinja2's own grammar (its precedences, its tuples, its optional `else`).

use std::sync::Arc;

use super::Program;
use super::ast::{Expr, ExprKind, FilterCall, For, Macro, Name, Stmt, StmtKind, Target};
use super::lexer::{Token, tokenize};
use super::meter::{Fault, Outcome};

/// Longest template that is read; the longest known in use are about 30 kB.
pub(crate) const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Highest expression tree and deepest nesting of tags and brackets.
pub(super) const MAX_HEIGHT: u32 = 100;

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

/// A cursor over the tokens. `nesting` bounds the native stack while parsing.
pub(super) struct Parser {
    pub(super) tokens: Vec<(Token, u32)>,
    pub(super) pos: usize,
    nesting: u32,
    loops: u32,
}

impl Parser {
    pub(super) fn line(&self) -> u32 {
        self.tokens.get(self.pos).or(self.tokens.last()).map_or(1, |t| t.1)
    }

    pub(super) fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.pos).map(|t| &t.0)
    }

    pub(super) fn next(&mut self) -> Option<Token> {
        let token = self.peek().cloned();
        self.pos += 1;
        token
    }

    pub(super) fn skip_op(&mut self, op: &str) -> bool {
        let hit = matches!(self.peek(), Some(Token::Op(o)) if *o == op);
        self.pos += usize::from(hit);
        hit
    }

    pub(super) fn skip_name(&mut self, name: &str) -> bool {
        let hit = self.at_name(name);
        self.pos += usize::from(hit);
        hit
    }

    pub(super) fn at_name(&self, name: &str) -> bool {
        matches!(self.peek(), Some(Token::Name(n)) if &**n == name)
    }

    pub(super) fn unexpected<T>(&self, wanted: &str) -> Outcome<T> {
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

    pub(super) fn expect_op(&mut self, op: &str) -> Outcome<()> {
        if self.skip_op(op) { Ok(()) } else { self.unexpected(&format!("'{op}'")) }
    }

    pub(super) fn expect_name(&mut self) -> Outcome<Name> {
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

    pub(super) fn nested<T>(&mut self, parse: impl FnOnce(&mut Self) -> Outcome<T>) -> Outcome<T> {
        self.nesting += 1;
        if self.nesting > MAX_HEIGHT {
            return Err(too_high());
        }
        let result = parse(self);
        self.nesting -= 1;
        result
    }

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

    pub(super) fn filter_call(&mut self) -> Outcome<FilterCall> {
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
}

pub(super) fn too_high() -> Fault {
    Fault::Limit { what: "levels of nesting", limit: u64::from(MAX_HEIGHT) }
}
