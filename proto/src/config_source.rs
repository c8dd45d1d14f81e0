//! Configuration from one or two URLs with the same content: what an answer of theirs is taken for, and which URL is
//! asked next. This module does not fetch. Start with [`Source`].
//!
//! Whatever a URL answers, the configuration in use stays until a complete, valid and other body arrives.

use sha2::{Digest as _, Sha256};

/// Maximum length of a body, in bytes: as long as a configuration file may be.
pub const BODY_BYTES_MAX: usize = 1024 * 1024;
/// Maximum length of an ETag that is sent back, in bytes.
const ETAG_BYTES_MAX: usize = 256;

crate::labels! {
    /// What a fetch gave.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub enum Outcome {
        /// A new configuration, which is used from now on.
        Taken = "taken",
        /// 304, or the body that is in use already.
        Unchanged = "unchanged",
        /// No complete answer in time.
        TimedOut = "timed_out",
        /// No connection, no TLS, or a connection that broke.
        Unreachable = "unreachable",
        /// The body ended before the length that was announced.
        Truncated = "truncated",
        /// A redirect. None is followed.
        Redirected = "redirected",
        /// 4xx.
        ClientError = "client_error",
        /// 5xx, or a status that no server should send here.
        ServerError = "server_error",
        /// 304, but nothing was fetched from there before, or what was fetched is not in use.
        UnaskedNotModified = "unasked_not_modified",
        /// Another body under the ETag of the last one.
        EtagReused = "etag_reused",
        /// HTML, JSON or XML, as login and error pages are.
        WrongType = "wrong_type",
        /// Nothing but white space.
        Empty = "empty",
        /// More than [`BODY_BYTES_MAX`].
        TooLarge = "too_large",
        /// Not a configuration: not TOML, an unknown setting, or a value out of its bounds.
        Invalid = "invalid",
    }
}

impl Outcome {
    /// Whether the URL answered with what is or will be in use.
    #[must_use]
    pub const fn is_contact(self) -> bool {
        matches!(self, Self::Taken | Self::Unchanged)
    }
}

/// The result of a request to a URL.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Response {
    /// No complete answer: [`Outcome::TimedOut`], [`Outcome::Unreachable`], [`Outcome::Truncated`] or
    /// [`Outcome::TooLarge`].
    Failed(Outcome),
    /// A complete answer.
    Answered {
        status: u16,
        etag: Option<Box<str>>,
        content_type: Option<Box<str>>,
        body: Vec<u8>,
    },
}

/// A response that is judged, apart from whether its body is a valid configuration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judged {
    /// Nothing to take.
    Settled(Outcome),
    /// A body that is not in use. If it is valid, it goes to [`Source::handle_taken`], else to
    /// [`Source::handle_refused`].
    Candidate(String),
}

/// One or two URLs, and the body that was last taken from them.
#[derive(Clone, Debug, Default)]
pub struct Source {
    urls: Vec<Known>,
    in_use: Option<Body>,
    /// The URL that is asked first: the last one that answered as it should.
    first: usize,
}

type Body = [u8; 32];

/// A URL, and its last answer.
#[derive(Clone, Debug, Default)]
struct Known {
    /// Its last ETag, and the body under it.
    last: Option<(Box<str>, Body)>,
}

impl Source {
    /// `in_use`: the body that is in use already, from an earlier process.
    #[must_use]
    pub fn new(urls: usize, in_use: Option<&str>) -> Self {
        Self {
            urls: vec![Known::default(); urls],
            in_use: in_use.map(digest),
            first: 0,
        }
    }

    /// The URLs in the order in which they are asked, until one of them answers as it should.
    pub fn order(&self) -> impl Iterator<Item = usize> + use<> {
        let (first, len) = (self.first, self.urls.len());
        (0..len).map(move |nth| (first + nth) % len)
    }

    /// The value of `If-None-Match` for a request: the ETag of the body in use, if it came from there.
    #[must_use]
    pub fn etag(&self, url: usize) -> Option<&str> {
        let (etag, body) = self.urls.get(url)?.last.as_ref()?;
        (Some(body) == self.in_use.as_ref()).then_some(&**etag)
    }

    /// Judges what a URL answered to a request with [`Source::etag`].
    pub fn handle_response(&mut self, url: usize, response: Response) -> Judged {
        let (status, etag, content_type, body) = match response {
            Response::Failed(outcome) => return Judged::Settled(outcome),
            Response::Answered {
                status,
                etag,
                content_type,
                body,
            } => (status, etag, content_type, body),
        };
        let refused = match status {
            200 => None,
            304 if self.etag(url).is_some() => {
                self.first = url;
                return Judged::Settled(Outcome::Unchanged);
            }
            304 => Some(Outcome::UnaskedNotModified),
            300..400 => Some(Outcome::Redirected),
            400..500 => Some(Outcome::ClientError),
            _ => Some(Outcome::ServerError),
        };
        let refused = refused.or_else(|| refusal(content_type.as_deref(), &body));
        if let Some(outcome) = refused {
            return Judged::Settled(outcome);
        }
        let Ok(body) = String::from_utf8(body) else {
            return Judged::Settled(Outcome::Invalid);
        };
        let Some(known) = self.urls.get_mut(url) else {
            return Judged::Settled(Outcome::Unreachable);
        };
        let found = digest(&body);
        let etag = etag.filter(|etag| (1..=ETAG_BYTES_MAX).contains(&etag.len()));
        if let (Some(etag), Some((last, under))) = (&etag, &known.last)
            && etag == last
            && *under != found
        {
            return Judged::Settled(Outcome::EtagReused);
        }
        known.last = etag.map(|etag| (etag, found));
        if self.in_use == Some(found) {
            self.first = url;
            return Judged::Settled(Outcome::Unchanged);
        }
        Judged::Candidate(body)
    }

    /// The candidate of a URL is valid, and is used from now on.
    pub fn handle_taken(&mut self, url: usize, body: &str) {
        self.in_use = Some(digest(body));
        self.first = url;
    }

    /// The candidate of a URL is not a valid configuration. The next request asks for it again, whole.
    pub fn handle_refused(&mut self, url: usize) {
        if let Some(known) = self.urls.get_mut(url) {
            known.last = None;
        }
    }
}

/// Why a body cannot be a configuration, whatever its text.
fn refusal(content_type: Option<&str>, body: &[u8]) -> Option<Outcome> {
    let media = content_type.unwrap_or_default().to_ascii_lowercase();
    if ["html", "json", "xml"].iter().any(|wrong| media.contains(wrong)) {
        Some(Outcome::WrongType)
    } else if body.len() > BODY_BYTES_MAX {
        Some(Outcome::TooLarge)
    } else if body.trim_ascii().is_empty() {
        Some(Outcome::Empty)
    } else {
        None
    }
}

fn digest(body: &str) -> Body {
    Sha256::digest(body.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: &str = "[drain]\nrate_per_second = 10\n";
    const NEW: &str = "[drain]\nrate_per_second = 20\n";

    fn answered(status: u16, etag: Option<&str>, body: &str) -> Response {
        Response::Answered {
            status,
            etag: etag.map(Into::into),
            content_type: None,
            body: body.into(),
        }
    }

    /// A source of two URLs whose first one gave `OLD` under the ETag `"1"`.
    fn used() -> Source {
        let mut source = Source::new(2, None);
        let judged = source.handle_response(0, answered(200, Some("\"1\""), OLD));
        assert_eq!(judged, Judged::Candidate(OLD.to_owned()));
        source.handle_taken(0, OLD);
        source
    }

    #[test]
    fn every_answer_but_another_whole_body_keeps_what_is_in_use() {
        let typed = |content_type: &str, body: &str| Response::Answered {
            status: 200,
            etag: None,
            content_type: Some(content_type.into()),
            body: body.into(),
        };
        let long = "#".repeat(BODY_BYTES_MAX + 1);
        let longest = "#".repeat(BODY_BYTES_MAX);
        for (response, outcome) in [
            (answered(304, None, ""), Outcome::Unchanged),
            (answered(200, Some("\"2\""), OLD), Outcome::Unchanged),
            (answered(200, None, OLD), Outcome::Unchanged),
            (answered(200, Some("\"1\""), NEW), Outcome::EtagReused),
            (answered(200, None, ""), Outcome::Empty),
            (answered(200, None, " \r\n\t"), Outcome::Empty),
            (answered(200, None, &long), Outcome::TooLarge),
            (answered(301, None, NEW), Outcome::Redirected),
            (answered(404, None, NEW), Outcome::ClientError),
            (answered(401, None, NEW), Outcome::ClientError),
            (answered(503, None, NEW), Outcome::ServerError),
            (answered(204, None, ""), Outcome::ServerError),
            (answered(206, None, NEW), Outcome::ServerError),
            (typed("text/HTML; charset=utf-8", NEW), Outcome::WrongType),
            (typed("application/json", NEW), Outcome::WrongType),
            (Response::Failed(Outcome::TimedOut), Outcome::TimedOut),
        ] {
            let mut source = used();

            let judged = source.handle_response(0, response.clone());

            assert_eq!(judged, Judged::Settled(outcome), "{response:?}");
            assert_eq!(source.in_use, Some(digest(OLD)), "{response:?}");
        }
        for body in [NEW, longest.as_str()] {
            for media in [
                "application/toml",
                "text/plain; charset=utf-8",
                "application/octet-stream",
            ] {
                let judged = used().handle_response(0, typed(media, body));
                assert_eq!(judged, Judged::Candidate(body.to_owned()), "{media}");
            }
        }
        let not_text = Response::Answered {
            status: 200,
            etag: None,
            content_type: None,
            body: vec![0xff, 0xfe],
        };
        assert_eq!(used().handle_response(0, not_text), Judged::Settled(Outcome::Invalid));
    }

    #[test]
    fn url_that_never_gave_the_body_in_use_can_not_say_that_it_is_unchanged() {
        let mut source = used();

        assert_eq!(source.etag(0), Some("\"1\""));
        assert_eq!(source.etag(1), None);
        let judged = source.handle_response(1, answered(304, None, ""));
        assert_eq!(judged, Judged::Settled(Outcome::UnaskedNotModified));

        // Nor can one whose later body was refused, or was never taken.
        assert!(matches!(
            source.handle_response(0, answered(200, Some("\"2\""), NEW)),
            Judged::Candidate(_)
        ));
        assert_eq!(source.etag(0), None);
        source.handle_refused(0);
        let judged = source.handle_response(0, answered(304, None, ""));
        assert_eq!(judged, Judged::Settled(Outcome::UnaskedNotModified));
    }

    #[test]
    fn refused_body_is_judged_again_and_not_taken_for_a_reused_etag() {
        let mut source = used();
        source.handle_response(0, answered(200, Some("\"2\""), "not valid"));
        source.handle_refused(0);

        let again = source.handle_response(0, answered(200, Some("\"2\""), NEW));

        assert_eq!(again, Judged::Candidate(NEW.to_owned()));
    }

    #[test]
    fn url_that_answered_last_is_asked_first_and_the_other_one_next() {
        let mut source = used();
        assert_eq!(source.order().collect::<Vec<_>>(), [0, 1]);

        source.handle_response(0, Response::Failed(Outcome::TimedOut));
        source.handle_response(1, answered(200, None, OLD));
        assert_eq!(source.order().collect::<Vec<_>>(), [1, 0]);

        source.handle_response(0, answered(200, None, NEW));
        source.handle_taken(0, NEW);
        assert_eq!(source.order().collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn body_of_an_earlier_process_is_in_use() {
        let mut source = Source::new(1, Some(OLD));

        let judged = source.handle_response(0, answered(200, Some("\"1\""), OLD));

        assert_eq!(judged, Judged::Settled(Outcome::Unchanged));
        assert_eq!(source.etag(0), Some("\"1\""));
    }
}
