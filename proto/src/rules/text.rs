//! Text forms of spans and times in a rule: `15m`, `2026-11-21T04:07:00Z`. For `#[serde(with = …)]`.

/// Spans, as `15m` or `1h 30m`.
pub(crate) mod span {
    use std::{borrow::Cow, time::Duration};

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn serialize<S: Serializer>(span: &Duration, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&humantime::format_duration(*span))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
        let text = Cow::<'de, str>::deserialize(deserializer)?;
        humantime::parse_duration(text.trim()).map_err(|error| {
            D::Error::custom(format!(
                "`{text}` is not a span of time such as `15m` or `1h 30m`: {error}"
            ))
        })
    }
}

/// Points in time, in RFC 3339 with any offset; written in UTC.
pub(super) mod time {
    use std::{borrow::Cow, time::SystemTime};

    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    use crate::time::WallTime;

    pub fn serialize<S: Serializer>(time: &Option<WallTime>, serializer: S) -> Result<S::Ok, S::Error> {
        let Some(time) = time else {
            return serializer.serialize_none();
        };
        serializer.serialize_str(&time.to_rfc3339().replace(".000Z", "Z"))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<WallTime>, D::Error> {
        let Some(text) = Option::<Cow<'de, str>>::deserialize(deserializer)? else {
            return Ok(None);
        };
        let time = parse(&text).ok_or_else(|| {
            D::Error::custom(format!(
                "`{text}` is not a point in time such as `2026-11-21T04:07:00Z`"
            ))
        })?;
        Ok(Some(time))
    }

    fn parse(text: &str) -> Option<WallTime> {
        let text = text.trim().to_ascii_uppercase();
        if !text.is_ascii() {
            return None;
        }
        let (local, offset_ms) = match text.strip_suffix('Z') {
            Some(local) => (local, 0),
            None => {
                let (local, offset) = text.split_at_checked(text.len().checked_sub("+00:00".len())?)?;
                (local, parse_offset_ms(offset)?)
            }
        };
        let local = humantime::parse_rfc3339(&format!("{local}Z")).ok()?;
        let local_ms = local.duration_since(SystemTime::UNIX_EPOCH).ok()?.as_millis();
        let unix_ms = i64::try_from(local_ms).ok()?.checked_sub(offset_ms)?;
        u64::try_from(unix_ms).ok().map(WallTime::from_unix_ms)
    }

    /// `+02:00` or `-05:30`, in milliseconds.
    fn parse_offset_ms(text: &str) -> Option<i64> {
        let bytes = text.as_bytes();
        let digit = |at: usize| {
            bytes
                .get(at)
                .filter(|byte| byte.is_ascii_digit())
                .map(|byte| i64::from(byte - b'0'))
        };
        let sign = match bytes.first()? {
            b'+' => 1,
            b'-' => -1,
            _ => return None,
        };
        let hours = digit(1)? * 10 + digit(2)?;
        let minutes = digit(4)? * 10 + digit(5)?;
        (bytes.get(3) == Some(&b':') && hours < 24 && minutes < 60).then_some(sign * (hours * 60 + minutes) * 60_000)
    }
}
