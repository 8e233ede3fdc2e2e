//! The tree of a template. Expressions know their height, which the parser bounds: evaluating and dropping recurse.

use std::sync::Arc;

use super::value::Value;

pub(super) type Name = Arc<str>;

pub(super) struct Stmt {
    pub(super) line: u32,
    pub(super) kind: StmtKind,
}

pub(super) enum StmtKind {
    Raw(String),
    Emit(Expr),
    For(For),
    /// Branches in order; the last may lack a condition (`else`).
    If(Vec<(Option<Expr>, Vec<Stmt>)>),
    Set {
        target: Target,
        value: Expr,
    },
    SetBlock {
        target: Target,
        filters: Vec<FilterCall>,
        body: Vec<Stmt>,
    },
    With {
        bindings: Vec<(Target, Expr)>,
        body: Vec<Stmt>,
    },
    FilterBlock {
        filters: Vec<FilterCall>,
        body: Vec<Stmt>,
    },
    Macro(Macro),
    /// `{% call %}`: the macro is the anonymous `caller`.
    CallBlock {
        call: Expr,
        caller: Macro,
    },
    Break,
    Continue,
}

pub(super) struct For {
    pub(super) target: Target,
    pub(super) iter: Expr,
    pub(super) filter: Option<Expr>,
    pub(super) recursive: bool,
    pub(super) body: Vec<Stmt>,
    pub(super) otherwise: Vec<Stmt>,
}

pub(super) struct Macro {
    pub(super) name: Name,
    pub(super) params: Vec<(Name, Option<Expr>)>,
    pub(super) body: Vec<Stmt>,
}

pub(super) enum Target {
    Name(Name),
    Attr(Name, Name),
    Tuple(Vec<Target>),
}

pub(super) struct FilterCall {
    pub(super) name: Name,
    pub(super) args: Vec<Arg>,
}

pub(super) enum Arg {
    Positional(Expr),
    Keyword(Name, Expr),
    Splat(Expr),
    KeywordSplat(Expr),
}

pub(super) struct Expr {
    pub(super) kind: ExprKind,
    pub(super) height: u32,
}

pub(super) enum ExprKind {
    Const(Value),
    Name(Name),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Attr(Box<Expr>, Name),
    Item(Box<Expr>, Box<Expr>),
    Slice(Box<Expr>, [Option<Box<Expr>>; 3]),
    Call(Box<Expr>, Vec<Arg>),
    Filter(Box<Expr>, FilterCall),
    Test { value: Box<Expr>, name: Name, args: Vec<Arg>, negated: bool },
    Not(Box<Expr>),
    Neg(Box<Expr>),
    Pos(Box<Expr>),
    Binary(BinaryOp, Box<Expr>, Box<Expr>),
    Concat(Vec<Expr>),
    And(Vec<Expr>),
    Or(Vec<Expr>),
    Compare(Box<Expr>, Vec<(CompareOp, Expr)>),
    If { test: Box<Expr>, then: Box<Expr>, otherwise: Option<Box<Expr>> },
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum BinaryOp {
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Rem,
    Pow,
}

impl BinaryOp {
    pub(super) fn symbol(self) -> &'static str {
        match self {
            Self::Add => "+",
            Self::Sub => "-",
            Self::Mul => "*",
            Self::Div => "/",
            Self::FloorDiv => "//",
            Self::Rem => "%",
            Self::Pow => "**",
        }
    }
}

#[derive(Clone, Copy, PartialEq, Debug)]
pub(super) enum CompareOp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    In,
    NotIn,
}
