//! Durations and times of the command line, in the API's form.

use std::time::{Duration, SystemTime};

use super::Failure;

/// Parses a duration, as in `15m`.
pub fn span(text: &str) -> Result<String, humantime::DurationError> {
    humantime::parse_duration(text).map(|_| text.to_owned())
}

/// Returns RFC 3339 for a time, or for a duration from now, rounded up to seconds.
pub fn point(text: &str) -> Result<String, Failure> {
    let wrong = || {
        Failure::WrongUse(format!(
            "--expires: {text}: expected RFC 3339, as in 2026-01-31T12:00:00Z, or a span from now, as in 2h"
        ))
    };
    let time = match humantime::parse_duration(text) {
        Ok(span) => {
            let (now, rounding) = (SystemTime::now(), Duration::from_millis(999));
            now.checked_add(span.saturating_add(rounding)).ok_or_else(wrong)?
        }
        Err(_) => point_in_time(text).ok_or_else(wrong)?,
    };
    Ok(humantime::format_rfc3339_seconds(time).to_string())
}

/// Parses RFC 3339 with `Z` or an offset, in either letter case. Without them it is UTC.
fn point_in_time(text: &str) -> Option<SystemTime> {
    let text = text.trim().to_ascii_uppercase();
    // After the date, whose hyphens are not an offset.
    let sign = text.get(10..)?.rfind(['+', '-']).map(|at| at + 10);
    let Some(sign) = sign else {
        return humantime::parse_rfc3339_weak(&text).ok();
    };
    let (local, offset) = text.split_at(sign);
    let local = humantime::parse_rfc3339(&format!("{local}Z")).ok()?;
    let (hours, minutes) = offset.get(1..)?.split_once(':')?;
    let number = |text: &str, max: u64| -> Option<u64> {
        let is_number = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        is_number
            .then(|| text.parse().ok())
            .flatten()
            .filter(|number| *number <= max)
    };
    let ahead = Duration::from_secs((number(hours, 23)? * 60 + number(minutes, 59)?) * 60);
    if offset.starts_with('+') {
        local.checked_sub(ahead)
    } else {
        local.checked_add(ahead)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expiry_is_a_point_or_a_span_from_now() {
        assert_eq!(point("2099-01-31T12:00:00Z").unwrap(), "2099-01-31T12:00:00Z");
        for text in [
            "2099-01-31t12:00:00z",
            "2099-01-31T14:00:00+02:00",
            "2099-01-31t07:30:00-04:30",
            "2099-01-31T12:00:00.9+00:00",
            "2099-01-31 12:00:00",
        ] {
            assert_eq!(point(text).unwrap(), "2099-01-31T12:00:00Z", "{text}");
        }
        for text in [
            "2099-01-31T12:00:00+2",
            "2099-01-31T12:00:00+24:00",
            "2099-01-31T12:00:00+02:60",
            "2099-01-31T12:00:00++1:00",
            "2099-01-31T12:00+02:00",
            "2099-01-31+02:00",
        ] {
            assert!(matches!(point(text), Err(Failure::WrongUse(_))), "{text}");
        }
        let soon = humantime::parse_rfc3339(&point("1ms").unwrap()).unwrap();
        assert!(soon > SystemTime::now(), "over before it is asked for");
        for text in ["tomorrow", "", "99999999999999999999y"] {
            assert!(matches!(point(text), Err(Failure::WrongUse(_))), "{text}");
        }
    }
}
