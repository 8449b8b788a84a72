//! Numbers and names as reports show them.

/// What stands where there is no value.
pub const MISSING: &str = "–";

/// `value` with so many decimals; never `-0.0`, and [`MISSING`] if it is no number.
pub fn fixed(value: f64, decimals: usize) -> String {
    if !value.is_finite() {
        return MISSING.into();
    }
    if value.abs() >= 1e12 {
        return format!("{value:.decimals$e}");
    }
    let text = format!("{value:.decimals$}");
    if text.trim_start_matches('-').chars().all(|c| matches!(c, '0' | '.')) {
        return text.trim_start_matches('-').into();
    }
    text
}

/// `value` with about four significant digits.
pub fn real(value: f64) -> String {
    significant(value, 4.0)
}

/// `value` with about three significant digits; for what is known less well than a value.
pub fn short(value: f64) -> String {
    significant(value, 3.0)
}

fn significant(value: f64, digits: f64) -> String {
    let size = value.abs();
    match size {
        _ if size == 0.0 => "0".into(),
        _ if size < 1e-4 => format!("{value:.1e}"),
        _ => fixed(value, (digits - 1.0 - size.log10().floor()).clamp(0.0, 6.0) as usize),
    }
}

/// With a sign, so that a difference is not taken for a value.
pub fn signed(text: String) -> String {
    if text.starts_with(['-', '–']) { text } else { format!("+{text}") }
}

/// A share in per cent, without the sign of it.
pub fn percent(share: f64) -> String {
    fixed(100.0 * share, 2)
}

/// `1,234,567`.
pub fn count(n: u64) -> String {
    let digits = n.to_string();
    let mut text = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1.234e12` as `1.23 T`, with the decimal prefixes.
pub fn scaled(n: u64) -> String {
    let prefixes = [(1e18, " E"), (1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")];
    let size = n as f64;
    match prefixes.iter().find(|(least, _)| size >= *least) {
        Some((unit, prefix)) => format!("{:.2}{prefix}", size / unit),
        None => format!("{n} "),
    }
}

/// Wall time in seconds.
pub fn seconds(seconds: f64) -> String {
    fixed(seconds, if seconds.abs() < 100.0 { 1 } else { 0 })
}

/// At most `chars` characters, the last of them an ellipsis if some were cut.
pub fn clip(text: &str, chars: usize) -> String {
    if text.chars().count() <= chars {
        return text.into();
    }
    text.chars().take(chars.saturating_sub(1)).chain(['…']).collect()
}

/// Control characters, which could end a line, move a cursor or colour a screen, as spaces.
pub fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Parts of a sentence, and whether each stood between backticks; all is text where they don't pair.
pub fn code_spans(text: &str) -> Vec<(bool, &str)> {
    let parts: Vec<&str> = text.split('`').collect();
    if parts.len().is_multiple_of(2) {
        return vec![(false, text)];
    }
    parts.into_iter().enumerate().map(|(i, part)| (i % 2 == 1, part)).filter(|(_, part)| !part.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_never_minus_zero() {
        assert_eq!((fixed(-0.04, 1), fixed(-0.06, 1), fixed(f64::NAN, 1)), ("0.0".into(), "-0.1".into(), "–".into()));
        let reals = [11.0512, 0.81234, 1234.56, 0.00012345, 1e-7, 0.0, f64::INFINITY, 3e20].map(real);
        assert_eq!(reals, ["11.05", "0.8123", "1235", "0.000123", "1.0e-7", "0", "–", "3e20"]);
        assert_eq!([0, 999, 1000, 1_234_567].map(count), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([12, 1_500, 7_260_000_000].map(scaled), ["12 ", "1.50 k", "7.26 G"]);
        assert_eq!([signed(real(0.5)), signed(real(-0.5)), signed(real(f64::NAN))], ["+0.5000", "-0.5000", "–"]);
    }

    #[test]
    fn backticks_that_pair_mark_code() {
        assert_eq!(code_spans("a `b` c"), [(false, "a "), (true, "b"), (false, " c")]);
        assert_eq!(code_spans("a `b c"), [(false, "a `b c")]);
    }

    #[test]
    fn long_names_are_cut_by_characters() {
        assert_eq!((clip("größer", 6), clip("größere", 6)), ("größer".into(), "größe…".into()));
        assert_eq!(clip("abc", 0), "…");
    }
}
