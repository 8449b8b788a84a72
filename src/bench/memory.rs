//! The memory of this process, as Linux tells it.

/// The most bytes that were resident at the same time, since the start or [`forget_peak`].
pub(super) fn peak_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Begins anew with what is resident now. Where the system does not allow it, the peak stays.
pub(super) fn forget_peak() {
    // 5 is the peak, by proc(5).
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}
