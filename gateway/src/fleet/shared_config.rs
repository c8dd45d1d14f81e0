//! The configuration that nodes share: fetching it from its URLs, and keeping it on disk for the next start. Start with
//! [`SharedConfig`].
//!
//! `seawall_proto::config_source` decides what an answer is taken for.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    time::Duration,
};

use seawall_proto::config_source::{BODY_BYTES_MAX, Judged, Outcome, Response, Source};
use sha2::{Digest as _, Sha256};
use ureq::Agent;

use crate::{
    fleet::http,
    runtime::{
        config::{ConfigError, SourceSettings, origin},
        data_dir::{read_bounded, write_atomically},
    },
};

/// Name of the file in the data directory.
pub const FILE: &str = "shared-config.toml";
/// Maximum time to connect to a URL.
const CONNECT_MAX: Duration = Duration::from_secs(3);
/// Maximum time of a request with its answer, however slowly it arrives.
const FETCH_MAX: Duration = Duration::from_secs(10);
/// The same at a start that has a configuration on disk.
const FETCH_AT_START_MAX: Duration = Duration::from_secs(2);
/// First line of the file. The SHA-256 of what follows it is in hexadecimal digits behind it.
const HEAD: &str = "# Kept by seawall: do not edit. sha256 ";
/// Maximum length of the file.
const FILE_BYTES_MAX: u64 = BODY_BYTES_MAX as u64 + 256;

/// One request to a URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fetched {
    /// Scheme and host of the URL.
    pub origin: String,
    pub outcome: Outcome,
    /// More about it.
    pub problem: Option<String>,
}

impl fmt::Display for Fetched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.origin, self.outcome.as_str())?;
        match &self.problem {
            Some(problem) => write!(f, " ({problem})"),
            None => Ok(()),
        }
    }
}

/// The URLs, and the text that was last taken from them.
pub struct SharedConfig {
    agent: Agent,
    urls: Vec<Box<str>>,
    source: Source,
    text: Option<String>,
    path: PathBuf,
    is_on_disk: bool,
}

impl fmt::Debug for SharedConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // URLs may have tokens, and the text passwords.
        f.write_str("SharedConfig(…)")
    }
}

impl SharedConfig {
    /// Reads what an earlier process kept. `None` if no URL is configured. A file that is damaged is logged, and not
    /// used.
    #[must_use]
    pub fn open(settings: &SourceSettings, data_dir: &Path) -> Option<Self> {
        if settings.urls.is_empty() {
            return None;
        }
        let path = data_dir.join(FILE);
        let text = match read(&path) {
            Ok(text) => Some(text),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "kept configuration not usable: ignored");
                None
            }
        };
        Some(Self {
            agent: http::agent(CONNECT_MAX, FETCH_MAX),
            urls: settings.urls.iter().map(|url| url.as_str().into()).collect(),
            source: Source::new(settings.urls.len(), text.as_deref()),
            is_on_disk: text.is_some(),
            text,
            path,
        })
    }

    /// The text in use. `None`: none was ever read.
    #[must_use]
    pub fn text(&self) -> Option<&str> {
        self.text.as_deref()
    }

    /// Asks the URLs in turn, until one answers as it should. Blocks for at most 10 s each, or 2 s each `at_start` if
    /// a configuration is on disk. `check` is asked for a text that is not in use yet.
    pub fn fetch(&mut self, at_start: bool, check: impl Fn(&str) -> Result<(), ConfigError>) -> Vec<Fetched> {
        let time_max = if at_start && self.text.is_some() {
            FETCH_AT_START_MAX
        } else {
            FETCH_MAX
        };
        let mut all = Vec::new();
        for url in self.source.order() {
            let fetched = self.fetch_from(url, time_max, &check);
            let is_contact = fetched.outcome.is_contact();
            all.push(fetched);
            if is_contact {
                break;
            }
        }
        all
    }

    fn fetch_from(
        &mut self,
        url: usize,
        time_max: Duration,
        check: impl Fn(&str) -> Result<(), ConfigError>,
    ) -> Fetched {
        let (response, problem) = self.ask(url, time_max);
        let fetched = |outcome, problem| Fetched {
            origin: origin(&self.urls[url]),
            outcome,
            problem,
        };
        match self.source.handle_response(url, response) {
            Judged::Settled(outcome) => fetched(outcome, problem),
            Judged::Candidate(text) => match check(&text) {
                Ok(()) => {
                    let fetched = fetched(Outcome::Taken, None);
                    self.source.handle_taken(url, &text);
                    self.text = Some(text);
                    self.is_on_disk = false;
                    fetched
                }
                Err(error) => {
                    let fetched = fetched(Outcome::Invalid, Some(error.to_string()));
                    self.source.handle_refused(url);
                    fetched
                }
            },
        }
    }

    fn ask(&self, url: usize, time_max: Duration) -> (Response, Option<String>) {
        let mut request = self.agent.get(&*self.urls[url]);
        if let Some(etag) = self.source.etag(url) {
            request = request.header("if-none-match", etag);
        }
        let asked = request
            .config()
            .timeout_connect(Some(CONNECT_MAX.min(time_max)))
            .timeout_global(Some(time_max))
            .build()
            .call();
        let mut answer = match asked {
            Ok(answer) => answer,
            Err(error) => return self.failed(url, &error, Outcome::Unreachable),
        };
        let status = answer.status().as_u16();
        let header = |name: &str| {
            let value = answer.headers().get(name).and_then(|value| value.to_str().ok());
            value.map(Box::from)
        };
        let (etag, content_type) = (header("etag"), header("content-type"));
        // The body of a refusal is of no interest.
        let mut body = Vec::new();
        if status == 200 {
            let bytes_max = u64::try_from(BODY_BYTES_MAX).unwrap_or(u64::MAX);
            match answer.body_mut().with_config().limit(bytes_max).read_to_vec() {
                Ok(read) => body = read,
                Err(error) => return self.failed(url, &error, Outcome::Truncated),
            }
        }
        let problem = (status != 200 && status != 304).then(|| format!("HTTP status {status}"));
        let response = Response::Answered {
            status,
            etag,
            content_type,
            body,
        };
        (response, problem)
    }

    fn failed(&self, url: usize, error: &ureq::Error, otherwise: Outcome) -> (Response, Option<String>) {
        let is_late = if let ureq::Error::Io(error) = error {
            error.kind() == io::ErrorKind::TimedOut
        } else {
            matches!(error, ureq::Error::Timeout(_))
        };
        let outcome = if is_late {
            Outcome::TimedOut
        } else if matches!(error, ureq::Error::BodyExceedsLimit(_)) {
            Outcome::TooLarge
        } else {
            otherwise
        };
        // Some errors repeat the URL.
        let url = &*self.urls[url];
        let problem = error.to_string().replace(url, &origin(url));
        (Response::Failed(outcome), Some(problem))
    }

    /// Keeps the text in use for the next start, unless it is on disk already.
    ///
    /// # Errors
    /// It cannot be written. It is tried again with the next call.
    pub fn keep(&mut self) -> io::Result<()> {
        if let (false, Some(text)) = (self.is_on_disk, &self.text) {
            let content = format!("{HEAD}{}\n{text}", digest_hex(text));
            // The text may have the database's password.
            write_atomically(&self.path, content.as_bytes(), 0o600)?;
            self.is_on_disk = true;
        }
        Ok(())
    }
}

fn read(path: &Path) -> io::Result<String> {
    let damaged = || io::Error::other("it is damaged");
    let content = String::from_utf8(read_bounded(path, FILE_BYTES_MAX)?).map_err(|_| damaged())?;
    let (head, text) = content.split_once('\n').ok_or_else(damaged)?;
    if head.strip_prefix(HEAD) == Some(&digest_hex(text)) {
        Ok(text.to_owned())
    } else {
        Err(damaged())
    }
}

fn digest_hex(text: &str) -> String {
    let digest: [u8; 32] = Sha256::digest(text.as_bytes()).into();
    data_encoding::HEXLOWER.encode(&digest)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const TEXT: &str = "[drain]\nrate_per_second = 7\n";

    fn settings() -> SourceSettings {
        SourceSettings {
            // A port at which nothing listens.
            urls: vec!["http://127.0.0.1:9/seawall.toml?token=hidden".to_owned()],
            ..SourceSettings::default()
        }
    }

    #[test]
    fn kept_text_is_read_again_and_a_damaged_one_never() {
        let home = tempfile::tempdir().unwrap();
        let mut shared = SharedConfig::open(&settings(), home.path()).unwrap();
        assert_eq!(shared.text(), None);
        shared.keep().unwrap();
        assert!(!home.path().join(FILE).exists());
        shared.text = Some(TEXT.to_owned());
        shared.keep().unwrap();

        let path = home.path().join(FILE);
        let kept = SharedConfig::open(&settings(), home.path()).unwrap();
        assert_eq!(kept.text(), Some(TEXT));
        let whole = fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            for damaged in [&flipped[..], &whole[..at]] {
                fs::write(&path, damaged).unwrap();
                let opened = SharedConfig::open(&settings(), home.path()).unwrap();
                assert_eq!(opened.text(), None, "byte {at}");
            }
        }
    }

    #[test]
    fn url_that_does_not_answer_keeps_the_text_and_is_named_without_its_token() {
        let home = tempfile::tempdir().unwrap();
        let mut shared = SharedConfig::open(&settings(), home.path()).unwrap();
        shared.text = Some(TEXT.to_owned());

        let fetched = shared.fetch(false, |_| unreachable!("there is no body"));

        assert_eq!(fetched.len(), 1);
        assert_eq!(fetched[0].outcome, Outcome::Unreachable);
        assert_eq!(fetched[0].origin, "http://127.0.0.1:9");
        assert!(!format!("{fetched:?}").contains("hidden"), "{fetched:?}");
        assert_eq!(shared.text(), Some(TEXT));
    }

    #[test]
    fn without_a_url_there_is_nothing_to_fetch() {
        let home = tempfile::tempdir().unwrap();

        assert!(SharedConfig::open(&SourceSettings::default(), home.path()).is_none());
    }
}
