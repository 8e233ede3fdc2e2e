//! The server under load, with an executor that computes nothing. The server is one process, the load another, on the same
//! cores.
//!
//! ```text
//! cargo bench -p slora-server --bench serving -- SCENARIO [--seconds S] [--steps-per-s R] [--repeats N] [--peer COMMAND]
//!                                                [--write NAME]
//! SCENARIO: requests, streams, overload, disconnects, stalled, memory
//! ```
//! Prints a line for each repetition. `--write` puts everything into `benches/results/serving-NAME.json`. `--peer` measures
//! another server, such as `benches/serving/fastapi_peer.py`.

mod engine;
mod process;
mod scenarios;

use std::path::Path;
use std::process::Command;

use serde_json::{Map, Value, json};

use scenarios::Options;

fn output_of(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

/// Processes that want to run, over the last minute, five and fifteen.
fn load_averages() -> Vec<f64> {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').take(3).filter_map(|number| number.parse().ok()).collect()
}

/// Below 0, other work on the machine had to wait: of this process, and of the group that the system schedules it with.
fn priority() -> Value {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let nice = stat.rsplit(')').next().and_then(|fields| fields.split_whitespace().nth(16)?.parse::<i64>().ok());
    let group = std::fs::read_to_string("/proc/self/autogroup").unwrap_or_default();
    let group_nice = group.split_whitespace().last().and_then(|nice| nice.parse::<i64>().ok());
    json!({"nice": nice, "autogroup_nice": group_nice})
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let half = values.len() / 2;
    if values.len() % 2 == 1 { values[half] } else { (values[half - 1] + values[half]) / 2.0 }
}

/// The figures of a repetition that are numbers.
fn numbers(figures: &Value) -> Map<String, Value> {
    let fields = figures.as_object().into_iter().flatten();
    fields.filter(|(_, value)| value.is_number()).map(|(name, value)| (name.clone(), value.clone())).collect()
}

fn medians(repetitions: &[Value]) -> Value {
    let names = numbers(&repetitions[0]["figures"]).into_iter().map(|(name, _)| name);
    let middle = |name: String| {
        let median = median(repetitions.iter().filter_map(|repetition| repetition["figures"][&name].as_f64()));
        (name, json!(median))
    };
    names.map(middle).collect::<Map<_, _>>().into()
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    if arguments.first().is_some_and(|argument| argument == "serve") {
        return process::serve(&arguments[1..]);
    }
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name);
        at.and_then(|at| arguments.get(at + 1)).cloned()
    };
    let number = |name: &str| {
        value(name).map(|text| text.parse::<f64>().unwrap_or_else(|error| panic!("{name} {text:?}: {error}")))
    };
    let options = Options {
        seconds: number("--seconds"),
        steps_per_s: number("--steps-per-s").unwrap_or(150.0),
        peer: value("--peer"),
    };
    let scenario = match arguments.first().map_or("requests", String::as_str) {
        "requests" => scenarios::requests,
        "streams" => scenarios::streams,
        "overload" => scenarios::overload,
        "disconnects" => scenarios::disconnects,
        "stalled" => scenarios::stalled,
        "memory" => scenarios::memory,
        other => panic!("{other:?} is none of requests, streams, overload, disconnects, stalled, memory"),
    };
    let repeat = |_| {
        let load_before = load_averages();
        let figures = scenario(&options);
        println!("{}", json!({"load_before": load_before, "figures": numbers(&figures)}));
        json!({"load_before": load_before, "figures": figures})
    };
    let repetitions: Vec<Value> = (0..number("--repeats").unwrap_or(1.0) as usize).map(repeat).collect();
    let report = json!({
        "commit": output_of("git", &["rev-parse", "HEAD"]),
        "is_clean": output_of("git", &["status", "--porcelain", "--untracked-files=no"]).is_empty(),
        "command": format!("cargo bench -p slora-server --bench serving -- {}", arguments.join(" ")),
        "versions": {"slora": env!("CARGO_PKG_VERSION"), "rustc": output_of("rustc", &["--version"])},
        "priority": priority(),
        "machine": {"cores": std::thread::available_parallelism().map_or(0, usize::from), "os": std::env::consts::OS},
        "medians": medians(&repetitions),
        "repetitions": repetitions,
    });
    if let Some(name) = value("--write") {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../benches/results");
        let path = folder.join(format!("serving-{name}.json"));
        std::fs::write(&path, format!("{report:#}\n")).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}
