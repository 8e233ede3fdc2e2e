//! The process's own figures, under the names that Prometheus' clients give them.

use std::fmt::Write;

use rustix::param::page_size;
use rustix::time::{ClockId, clock_gettime};

use crate::histogram::header;

/// Appends the families. What the system does not tell is left out.
pub(crate) fn write(out: &mut String) {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    let seconds = time.tv_sec as f64 + time.tv_nsec as f64 / 1e9;
    sample(out, "process_cpu_seconds_total", "counter", "Processor time of all threads.", seconds);
    let memory = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let mut pages = memory.split(' ').map_while(|pages| pages.parse::<u64>().ok());
    if let (Some(virtual_pages), Some(resident_pages)) = (pages.next(), pages.next()) {
        let bytes = |pages: u64| (pages * page_size() as u64) as f64;
        sample(out, "process_virtual_memory_bytes", "gauge", "Virtual memory.", bytes(virtual_pages));
        sample(out, "process_resident_memory_bytes", "gauge", "Resident memory.", bytes(resident_pages));
    }
    if let Ok(descriptors) = std::fs::read_dir("/proc/self/fd") {
        // One of them reads the folder.
        let open = descriptors.count().saturating_sub(1);
        sample(out, "process_open_fds", "gauge", "Open file descriptors.", open as f64);
    }
}

fn sample(out: &mut String, name: &str, kind: &str, help: &str, value: f64) {
    header(out, name, kind, help);
    let _ = writeln!(out, "{name} {value}");
}
