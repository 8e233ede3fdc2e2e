//! The Jinja of chat templates, evaluated as Jinja2's immutable sandbox evaluates it, with every unit of work and memory
//! charged to one meter.
//!
//! Why our own: templates come with a model and their input from strangers, so a rendering must be bounded whatever both
//! hold, and it must print as Python prints. A general engine's fuel counts instructions, not what one instruction
//! allocates (doubling a string 22 times took 10 GB under a fuel of 10⁶ in minijinja 2.24), and nesting values 10⁵ deep
//! overflows the native stack when they are dropped; neither can be closed from outside.
//!
//! How it is bounded:
//! * [`Meter`]: every node evaluated, element visited and 64 bytes of text touched costs one unit of fuel, charged before
//!   the work is done.
//! * Trees have a height limit (parse time), calls a depth limit (run time), values a depth limit (construction), so that
//!   no recursion over them can exhaust the stack.
//! * Values are immutable; namespaces and macros are indices into the renderer, so that no cycle can be built.
//!
//! What is left out fails when the template is parsed or the construct is reached, never silently: `include`, `import`,
//! `extends`, `block`, `do`, line statements, and filters that write HTML.

mod args;
mod ast;
mod calls;
mod eval;
mod expressions;
mod filters;
mod functions;
mod json;
mod lexer;
mod meter;
mod methods;
mod ops;
mod parser;
mod predicates;
mod printf;
mod sorting;
mod statements;
mod strftime;
mod text;
mod value;

pub(crate) use eval::{Clock, render};
pub(crate) use meter::Fault;
pub(crate) use parser::parse;
pub(crate) use value::Value;

/// A parsed template: immutable, shared by all threads.
pub(crate) struct Program {
    body: Vec<ast::Stmt>,
}
