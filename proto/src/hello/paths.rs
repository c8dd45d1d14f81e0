//! `[server] paths`: where devices connect, and which part of a path is the device id. Start with [`Paths`].

use serde::{Deserialize, Serialize};

/// Segment that stands for the device id.
const DEVICE: &str = "{device}";

/// Paths of probes. Devices cannot connect there.
const PROBES: [&str; 2] = ["/healthz", "/readyz"];

/// Accepted paths of device requests, in order. Repeated slashes are treated as one, in requests and here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct Paths(Vec<String>);

impl Paths {
    /// Maximum number of paths.
    pub const COUNT_MAX: usize = 16;
    /// Maximum length of a path, in bytes.
    pub const LEN_MAX: usize = 256;

    /// Whether `path` is one of these, and its device segment, still percent-encoded.
    pub(super) fn find<'a>(&self, path: &'a str) -> Option<Option<&'a str>> {
        self.0.iter().find_map(|pattern| matched(pattern, path))
    }
}

impl Default for Paths {
    fn default() -> Self {
        Self(vec!["/v1/connect".to_owned()])
    }
}

impl TryFrom<Vec<String>> for Paths {
    type Error = InvalidPath;

    fn try_from(paths: Vec<String>) -> Result<Self, InvalidPath> {
        if paths.is_empty() || paths.len() > Self::COUNT_MAX {
            return Err(InvalidPath("expected 1 to 16 paths"));
        }
        for path in &paths {
            let is_plain = |segment: &str| segment.bytes().all(|byte| is_path_byte(byte) && byte != b'%');
            let devices = path.split('/').filter(|segment| *segment == DEVICE).count();
            if !path.starts_with('/') || path.len() > Self::LEN_MAX {
                return Err(InvalidPath("a path begins with a slash and has at most 256 bytes"));
            }
            if devices > 1 || !path.split('/').all(|segment| segment == DEVICE || is_plain(segment)) {
                return Err(InvalidPath(
                    "a path has letters, digits and -._~!$&'()*+,;=:@, and {device} at most once, between slashes",
                ));
            }
            if PROBES.iter().any(|probe| matched(path, probe).is_some()) {
                return Err(InvalidPath("/readyz and /healthz are for probes"));
            }
        }
        Ok(Self(paths))
    }
}

impl From<Paths> for Vec<String> {
    fn from(paths: Paths) -> Self {
        paths.0
    }
}

/// An invalid list of paths.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("paths: {0}")]
pub struct InvalidPath(&'static str);

/// Bytes of a path segment (RFC 3986 §3.3).
const fn is_path_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric()
        || matches!(
            byte,
            b'-' | b'.'
                | b'_'
                | b'~'
                | b'!'
                | b'$'
                | b'&'
                | b'\''
                | b'('
                | b')'
                | b'*'
                | b'+'
                | b','
                | b';'
                | b'='
                | b':'
                | b'@'
                | b'%'
        )
}

fn matched<'a>(pattern: &str, path: &'a str) -> Option<Option<&'a str>> {
    if !path.starts_with('/') || pattern.ends_with('/') != path.ends_with('/') {
        return None;
    }
    let mut device = None;
    let (mut wanted, mut stated) = (segments(pattern), segments(path));
    loop {
        match (wanted.next(), stated.next()) {
            (None, None) => return Some(device),
            (Some(DEVICE), Some(text)) => device = Some(text),
            (Some(wanted), Some(stated)) if wanted == stated => {}
            (_, Some(_)) | (Some(_), None) => return None,
        }
    }
}

fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|segment| !segment.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(texts: &[&str]) -> Result<Paths, InvalidPath> {
        let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
        texts.try_into()
    }

    #[test]
    fn path_is_found_with_its_device_and_repeated_slashes_count_as_one() {
        let paths = paths(&["/v1/connect", "/ocpp/{device}", "/{device}/ws/"]).unwrap();
        for (path, found) in [
            ("/v1/connect", Some(None)),
            ("//v1///connect", Some(None)),
            ("/v1/connect/", None),
            ("/V1/connect", None),
            ("/v1", None),
            ("/v1/connect/x", None),
            ("v1/connect", None),
            ("/ocpp/CP%2001", Some(Some("CP%2001"))),
            ("//ocpp//CP1", Some(Some("CP1"))),
            ("/ocpp/", None),
            ("/ocpp", None),
            ("/ocpp/a/b", None),
            ("/a/ws/", Some(Some("a"))),
            ("/", None),
            ("", None),
            ("*", None),
        ] {
            assert_eq!(paths.find(path), found, "{path}");
        }
        assert_eq!(Paths::default().find("/v1/connect"), Some(None));
        assert_eq!(Paths::default().find("/ocpp/CP1"), None);
    }

    #[test]
    fn paths_that_cannot_be_asked_for_are_refused() {
        for bad in [
            &[][..],
            &["v1/connect"],
            &[""],
            &["/a b"],
            &["/a?b"],
            &["/a#b"],
            &["/%61"],
            &["/x{device}"],
            &["/{id}"],
            &["/{device}/{device}"],
            &["/readyz"],
            &["//healthz"],
            &["/{device}"],
            &["/\u{e9}"],
            &["/a"; 17],
        ] {
            assert!(paths(bad).is_err(), "{bad:?}");
        }
        assert!(paths(&[&format!("/{}", "a".repeat(256))]).is_err());
        assert!(paths(&["/", "/a/{device}/b"]).is_ok());
    }
}
