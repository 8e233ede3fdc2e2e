//! Expressions, loosest first: the half of the parser that reads the inside of tags.

use super::ast::{Arg, BinaryOp, CompareOp, Expr, ExprKind};
use super::lexer::Token;
use super::meter::{Fault, Outcome};
use super::parser::{MAX_HEIGHT, Parser, too_high};
use super::value::Value;

impl Parser {
    fn build(&self, height: u32, kind: ExprKind) -> Outcome<Expr> {
        if height >= MAX_HEIGHT { Err(too_high()) } else { Ok(Expr { kind, height: height + 1 }) }
    }

    /// One expression, or several with commas between them: a tuple.
    pub(super) fn tuple(&mut self, with_condition: bool) -> Outcome<Expr> {
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

    pub(super) fn expr(&mut self) -> Outcome<Expr> {
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

    pub(super) fn or(&mut self) -> Outcome<Expr> {
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

    pub(super) fn args(&mut self) -> Outcome<Vec<Arg>> {
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
