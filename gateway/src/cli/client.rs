//! The client of the API: requests, answers, and refusals as text.

use std::{
    io::{BufReader, Read},
    time::Duration,
};

use serde_json::Value;
use ureq::{Agent, Body, SendBody, http::Response};

use super::{
    Common, Failure,
    access::{self, Token, await_start},
    table,
};

/// `source` of an answer from a gateway's memory, while its database does not answer.
pub const MEMORY: &str = "memory";

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longer than the gateway's own maximum.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// An import of a million lines is one transaction.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(3_600);
/// Maximum size of an answer, in bytes. A page of 1,000 rows is far below it.
const ANSWER_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Number of rows of one request.
const PAGE_LEN: usize = 500;
/// One gateway's API, and the token for it.
pub struct Client {
    agent: Agent,
    base: String,
    token: Token,
    /// Whether to wait for a gateway on this machine to listen.
    awaits_start: bool,
}

/// Method of a change.
#[derive(Clone, Copy)]
pub enum Method {
    Post,
    Put,
    Patch,
    Delete,
}

/// An answer, whatever its status.
pub struct Answer {
    pub status: u16,
    pub body: Value,
}

/// An answer that is not a success.
#[derive(Debug)]
pub struct Refusal {
    pub status: u16,
    /// An error in the API's form, unless the server is not a gateway.
    pub body: Value,
    /// Text for people.
    pub text: String,
}

impl Refusal {
    /// Whether a value of the command line is wrong. The lines of a file are not part of it.
    pub fn is_wrong_use(&self) -> bool {
        matches!(self.status, 400 | 422) && self.body.get("bad_lines").is_none()
    }
}

impl Client {
    /// Finds the token: `SEAWALL_TOKEN`, else `admin.token` in the data directory, else none. The file's token is only
    /// sent to the gateway of that directory and to addresses of this machine.
    ///
    /// # Errors
    /// The URL is not that of an API, or the token file or the file of authorities can't be read.
    pub fn new(common: &Common) -> Result<Self, Failure> {
        Self::with(common, true)
    }

    /// The same for a check, which does not wait for a gateway to start.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn for_check(common: &Common) -> Result<Self, Failure> {
        Self::with(common, false)
    }

    fn with(common: &Common, awaits_start: bool) -> Result<Self, Failure> {
        let base = common.url.trim_end_matches('/').to_owned();
        // It would appear in messages, and in the list of processes.
        if base.contains('@') {
            return Err(Failure::WrongUse(
                "SEAWALL_URL or --url: expected http://HOST:PORT or https://HOST:PORT, without a name or a password. \
                 The token comes from SEAWALL_TOKEN"
                    .into(),
            ));
        }
        let is_tls = base.starts_with("https://");
        if !is_tls && !base.starts_with("http://") {
            return Err(Failure::WrongUse(format!(
                "SEAWALL_URL or --url: {base:?} is not an API address: expected http://HOST:PORT or https://HOST:PORT"
            )));
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            // A proxy of the environment is not for a gateway on loopback or in a private network.
            .proxy(None)
            .timeout_connect(Some(CONNECT_TIMEOUT));
        let config = if is_tls {
            config.tls_config(access::trust(common.ca.as_deref())?).build()
        } else {
            config.build()
        };
        Ok(Self {
            token: access::token(common.data_dir.as_deref(), &base, awaits_start)?,
            agent: config.into(),
            base,
            awaits_start,
        })
    }

    /// Waits for the gateway, if that was requested.
    fn await_start(&self) {
        if self.awaits_start {
            await_start(&self.base);
        }
    }

    /// Why there is no token, if there is none.
    pub fn missing_token(&self) -> Option<&str> {
        match &self.token {
            Token::Known(_) => None,
            Token::Missing(reason) => Some(reason),
        }
    }

    /// The API's address, for messages.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Sends a GET request.
    ///
    /// # Errors
    /// The gateway can't be reached, or refuses.
    pub fn get(&self, path: &str, query: &[(&str, String)]) -> Result<Value, Failure> {
        self.get_any(path, query)?.ok()
    }

    /// Sends a GET request. A refusal is an answer as well.
    ///
    /// # Errors
    /// The gateway can't be reached.
    pub fn get_any(&self, path: &str, query: &[(&str, String)]) -> Result<Answer, Failure> {
        let mut request = self.agent.get(format!("{}{path}", self.base));
        for (name, value) in query {
            request = request.query(*name, value);
        }
        let request = request.config().timeout_global(Some(ANSWER_TIMEOUT)).build();
        let answer = self.authorized(request).call();
        self.answer(answer)
    }

    /// Reads up to `wanted` rows of a list, page by page. Its `source` is [`MEMORY`] if that of any page is, and its
    /// `unreadable` has those of all pages.
    ///
    /// # Errors
    /// The gateway can't be reached, or refuses.
    pub fn list(&self, path: &str, query: &[(&str, String)], wanted: usize) -> Result<Value, Failure> {
        let mut query = query.to_vec();
        let mut items = Vec::new();
        let (mut source, mut unreadable) = (Value::Null, None);
        loop {
            let mut asked = query.clone();
            asked.push(("limit", (wanted - items.len()).min(PAGE_LEN).to_string()));
            let mut page = self.get(path, &asked)?;
            let Some(Value::Array(rows)) = page.get_mut("items").map(Value::take) else {
                return Err(Failure::failed(format!(
                    "{}{path}: expected a list, and got something else",
                    self.base
                )));
            };
            items.extend(rows);
            if source != MEMORY {
                source = page.get_mut("source").map(Value::take).unwrap_or_default();
            }
            if let Some(Value::Array(ids)) = page.get_mut("unreadable").map(Value::take) {
                unreadable.get_or_insert_with(Vec::new).extend(ids);
            }
            // A page may be shorter than asked for, even empty, before the end of the list.
            match page.get("next_cursor").and_then(Value::as_str) {
                Some(cursor) if items.len() < wanted => {
                    query.retain(|(name, _)| *name != "cursor");
                    query.push(("cursor", cursor.to_owned()));
                }
                cursor => {
                    let mut list = serde_json::json!({"items": items, "next_cursor": cursor});
                    // Only some lists have them.
                    if !source.is_null() {
                        list["source"] = source;
                    }
                    if let Some(unreadable) = unreadable {
                        list["unreadable"] = unreadable.into();
                    }
                    return Ok(list);
                }
            }
        }
    }

    /// Sends a change.
    ///
    /// # Errors
    /// The gateway can't be reached, or refuses.
    pub fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, Failure> {
        self.send_any(method, path, body)?.ok()
    }

    /// Sends a change. A refusal is an answer as well.
    ///
    /// # Errors
    /// The gateway can't be reached.
    pub fn send_any(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Answer, Failure> {
        let url = format!("{}{path}", self.base);
        let limit = Some(ANSWER_TIMEOUT);
        let answer = match (method, body) {
            (Method::Delete, _) => self
                .authorized(self.agent.delete(url).config().timeout_global(limit).build())
                .call(),
            (Method::Post, Some(body)) => self
                .authorized(self.agent.post(url).config().timeout_global(limit).build())
                .send_json(body),
            (Method::Post, None) => self
                .authorized(self.agent.post(url).config().timeout_global(limit).build())
                .send_empty(),
            (Method::Put, body) => self
                .authorized(self.agent.put(url).config().timeout_global(limit).build())
                .send_json(body.unwrap_or(&Value::Null)),
            (Method::Patch, body) => self
                .authorized(self.agent.patch(url).config().timeout_global(limit).build())
                .send_json(body.unwrap_or(&Value::Null)),
        };
        self.answer(answer)
    }

    /// Streams a body of any length.
    ///
    /// # Errors
    /// The gateway can't be reached.
    pub fn upload(&self, path: &str, content_type: &str, body: &mut dyn Read) -> Result<Answer, Failure> {
        let request = self
            .agent
            .post(format!("{}{path}", self.base))
            .content_type(content_type)
            // A refusal then arrives before the body is sent.
            .header("Expect", "100-continue");
        let request = request.config().timeout_global(Some(UPLOAD_TIMEOUT)).build();
        let answer = self.authorized(request).send(SendBody::from_reader(body));
        self.answer(answer)
    }

    /// Opens the event stream after event `last`.
    ///
    /// # Errors
    /// The gateway can't be reached, or refuses.
    pub fn stream(
        &self,
        path: &str,
        query: &[(&str, &str)],
        last: Option<&str>,
    ) -> Result<BufReader<impl Read + use<>>, Failure> {
        let mut request = self
            .agent
            .get(format!("{}{path}", self.base))
            .header("Accept", "text/event-stream");
        for (name, value) in query {
            request = request.query(*name, *value);
        }
        if let Some(last) = last {
            request = request.header("Last-Event-ID", last);
        }
        match self.authorized(request).call() {
            Ok(response) if response.status().is_success() => Ok(BufReader::new(response.into_body().into_reader())),
            other => match self.answer(other)?.ok() {
                Ok(_) => Err(Failure::failed(format!(
                    "{}{path}: expected an event stream, and got something else",
                    self.base
                ))),
                Err(failure) => Err(failure),
            },
        }
    }

    fn authorized<B>(&self, request: ureq::RequestBuilder<B>) -> ureq::RequestBuilder<B> {
        self.await_start();
        match &self.token {
            Token::Known(token) => request.header("Authorization", format!("Bearer {token}")),
            Token::Missing(_) => request,
        }
    }

    fn answer(&self, answer: Result<Response<Body>, ureq::Error>) -> Result<Answer, Failure> {
        let mut response = answer.map_err(|error| {
            Failure::Unreachable(anyhow::anyhow!(
                "cannot reach the gateway at {}: {}. Set SEAWALL_URL or --url if it runs elsewhere",
                self.base,
                unreachable(&error)
            ))
        })?;
        let status = response.status().as_u16();
        let text = response
            .body_mut()
            .with_config()
            .limit(ANSWER_BYTES_MAX)
            .read_to_string()
            .map_err(|error| Failure::failed(format!("the answer of {} was cut off: {error}", self.base)))?;
        let body = match serde_json::from_str(&text) {
            Ok(body) => body,
            Err(_) if text.is_empty() => Value::Null,
            Err(_) => Value::String(text),
        };
        if status == 401
            && let Some(reason) = self.missing_token()
        {
            return Err(Failure::failed(reason.to_owned()));
        }
        let detail = body.get("detail").and_then(Value::as_str);
        if status == 400 && detail.is_some_and(is_from_tls_listener) {
            return Err(Failure::Unreachable(anyhow::anyhow!(
                "{} uses TLS: set SEAWALL_URL or --url to an address with https://",
                self.base
            )));
        }
        if status == 404 && detail.is_some_and(is_from_device_listener) {
            return Err(Failure::failed(format!(
                "{} is the address for devices: set SEAWALL_URL or --url to the address of the API (usually port 8081)",
                self.base
            )));
        }
        Ok(Answer { status, body })
    }
}

/// Returns the error in terms of the address that was given.
fn unreachable(error: &ureq::Error) -> String {
    let text = error.to_string();
    if text.contains("InvalidContentType") {
        return "it does not use TLS: use http://".to_owned();
    }
    text
}

/// Whether it is the answer of a TLS listener to plain HTTP.
fn is_from_tls_listener(detail: &str) -> bool {
    detail.starts_with("this port uses TLS")
}

/// Whether it is the device listener's answer to another path.
fn is_from_device_listener(detail: &str) -> bool {
    detail.starts_with("devices connect at ")
}

impl Answer {
    /// Returns the body of a success, else the refusal as text.
    ///
    /// # Errors
    /// The status is not 2xx.
    pub fn ok(self) -> Result<Value, Failure> {
        if (200..300).contains(&self.status) {
            Ok(self.body)
        } else {
            let text = self.refusal();
            Err(self.refused(text))
        }
    }

    /// Returns the refusal with `text` for people.
    pub fn refused(self, text: String) -> Failure {
        let Self { status, body } = self;
        Failure::Refused(Box::new(Refusal { status, body, text }))
    }

    /// The refusal's code, as in `needs_confirmation`.
    pub fn code(&self) -> Option<&str> {
        self.body.get("code").and_then(Value::as_str)
    }

    /// Returns the refusal as text.
    pub fn refusal(&self) -> String {
        let detail = ["detail", "title"]
            .iter()
            .find_map(|key| self.body.get(key).and_then(Value::as_str));
        match (self.status, detail) {
            (401, _) => "the gateway does not accept this token: set SEAWALL_TOKEN, or --data-dir to the directory with its admin.token"
                .to_owned(),
            (status, Some(detail)) => match self.code() {
                Some(code) => format!("{detail} ({status} {code})"),
                None => format!("{detail} ({status})"),
            },
            (status, None) => format!("the gateway answered {status} {}", table::cell(&self.body)),
        }
    }
}
