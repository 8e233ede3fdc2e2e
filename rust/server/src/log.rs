//! JSON lines on stdout, written by a thread of their own: a full pipe holds nobody up.

use std::io::{BufWriter, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Map, Value, json};

/// Lines that may wait to be written; further ones are counted and dropped.
const MAX_LINES: usize = 16_384;

/// Where lines go; clones write to the same place.
#[derive(Clone)]
pub(crate) struct Log {
    sender: SyncSender<String>,
    dropped: Arc<AtomicU64>,
}

impl Log {
    pub fn start() -> std::io::Result<Self> {
        let (sender, receiver) = sync_channel(MAX_LINES);
        let dropped = Arc::new(AtomicU64::new(0));
        let count = dropped.clone();
        std::thread::Builder::new().name("slora-log".into()).spawn(move || write(&receiver, &count))?;
        Ok(Self { sender, dropped })
    }

    /// One line: the time, what happened, and `fields`.
    pub fn line(&self, event: &str, fields: Value) {
        let mut line = Map::new();
        line.insert("time".into(), json!(unix_time_s()));
        line.insert("event".into(), json!(event));
        if let Value::Object(fields) = fields {
            line.extend(fields);
        }
        if let Err(TrySendError::Full(_)) = self.sender.try_send(Value::Object(line).to_string()) {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Seconds since 1970, to the millisecond.
pub(crate) fn unix_time_s() -> f64 {
    let millis = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_millis());
    millis as f64 / 1e3
}

fn write(receiver: &Receiver<String>, dropped: &AtomicU64) {
    let mut out = BufWriter::with_capacity(64 << 10, std::io::stdout());
    while let Ok(first) = receiver.recv() {
        let mut next = Some(first);
        while let Some(line) = next {
            // A closed stdout is no reason to stop serving.
            let _ = writeln!(out, "{line}");
            next = receiver.try_recv().ok();
        }
        let lost = dropped.swap(0, Ordering::Relaxed);
        if lost > 0 {
            let _ = writeln!(out, "{}", json!({"time": unix_time_s(), "event": "log_lines_dropped", "count": lost}));
        }
        let _ = out.flush();
    }
}
