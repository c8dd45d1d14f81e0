//! The API as the command line sees it: one request, one answer, and what refusals mean in words.

use std::{
    fs,
    io::{BufReader, Read},
    path::Path,
    sync::Arc,
    time::Duration,
};

use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde_json::Value;
use ureq::{
    Agent, Body, SendBody,
    http::Response,
    tls::{Certificate, RootCerts, TlsConfig},
};

use super::{Common, Failure, table};
use crate::tls;

/// Where a gateway's API is unless `SEAWALL_URL` says otherwise.
pub const DEFAULT_URL: &str = "http://127.0.0.1:8081";
/// Where a gateway's files are unless `SEAWALL_DATA_DIR` says otherwise.
pub const DEFAULT_DATA_DIR: &str = "./seawall-data";

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longer than the gateway gives any request of its own.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// An import of a million lines is one transaction.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(3_600);
/// Greatest answer that is read: a page of 1,000 rows is far below it.
const ANSWER_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Rows asked for in one request.
const PAGE_LEN: usize = 500;

/// One gateway's API, and the token for it.
pub struct Client {
    agent: Agent,
    base: String,
    token: Option<String>,
}

/// How a change is asked for.
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

impl Client {
    /// Finds the token: `SEAWALL_TOKEN`, else `admin.token` in the data directory, else none.
    ///
    /// # Errors
    /// The URL is none of an API, or the token file or the file of authorities can't be read.
    pub fn new(common: &Common) -> Result<Self, Failure> {
        let base = common.url.trim_end_matches('/').to_owned();
        // It would stand in messages, and in the list of processes.
        if base.contains('@') {
            return Err(Failure::WrongUse(
                "--url: expected http://HOST:PORT or https://HOST:PORT, without a name or a password: the token comes from SEAWALL_TOKEN"
                    .into(),
            ));
        }
        let is_tls = base.starts_with("https://");
        if !is_tls && !base.starts_with("http://") {
            return Err(Failure::WrongUse(format!(
                "--url: {base}: expected http://HOST:PORT or https://HOST:PORT"
            )));
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            // A proxy of the environment is for the web, not for a gateway on loopback or in a private network.
            .proxy(None)
            .timeout_connect(Some(CONNECT_TIMEOUT));
        let config = if is_tls {
            config.tls_config(trust(common.ca.as_deref())?).build()
        } else {
            config.build()
        };
        Ok(Self {
            agent: config.into(),
            base,
            token: token(common.data_dir.as_deref())?,
        })
    }

    /// Whether there is a token to show.
    pub fn has_token(&self) -> bool {
        self.token.is_some()
    }

    /// The API's address, for messages.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// Reads something.
    ///
    /// # Errors
    /// Nothing answers, or the answer is a refusal.
    pub fn get(&self, path: &str, query: &[(&str, String)]) -> Result<Value, Failure> {
        self.get_any(path, query)?.ok()
    }

    /// Reads something, taking refusals as answers.
    ///
    /// # Errors
    /// Nothing answers.
    pub fn get_any(&self, path: &str, query: &[(&str, String)]) -> Result<Answer, Failure> {
        let mut request = self.agent.get(format!("{}{path}", self.base));
        for (name, value) in query {
            request = request.query(*name, value);
        }
        let request = request.config().timeout_global(Some(ANSWER_TIMEOUT)).build();
        let answer = self.authorized(request).call();
        self.answer(answer)
    }

    /// Reads up to `wanted` rows of a list, page by page.
    ///
    /// # Errors
    /// Nothing answers, or an answer is a refusal.
    pub fn list(&self, path: &str, query: &[(&str, String)], wanted: usize) -> Result<Value, Failure> {
        let mut query = query.to_vec();
        let mut items = Vec::new();
        loop {
            let mut asked = query.clone();
            asked.push(("limit", (wanted - items.len()).min(PAGE_LEN).to_string()));
            let mut page = self.get(path, &asked)?;
            let Some(Value::Array(rows)) = page.get_mut("items").map(Value::take) else {
                return Err(Failure::failed(format!("{}{path}: the answer is no list", self.base)));
            };
            items.extend(rows);
            // A page may be shorter than asked for, even empty, before the end of the list.
            match page.get("next_cursor").and_then(Value::as_str) {
                Some(cursor) if items.len() < wanted => {
                    query.retain(|(name, _)| *name != "cursor");
                    query.push(("cursor", cursor.to_owned()));
                }
                cursor => return Ok(serde_json::json!({"items": items, "next_cursor": cursor})),
            }
        }
    }

    /// Changes something.
    ///
    /// # Errors
    /// Nothing answers, or the answer is a refusal.
    pub fn send(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, Failure> {
        self.send_any(method, path, body)?.ok()
    }

    /// Changes something, taking refusals as answers.
    ///
    /// # Errors
    /// Nothing answers.
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
    /// Nothing answers.
    pub fn upload(&self, path: &str, content_type: &str, body: &mut dyn Read) -> Result<Answer, Failure> {
        let request = self
            .agent
            .post(format!("{}{path}", self.base))
            .content_type(content_type)
            // A refusal then comes before the body: a gateway that has refused reads no more of it.
            .header("Expect", "100-continue");
        let request = request.config().timeout_global(Some(UPLOAD_TIMEOUT)).build();
        let answer = self.authorized(request).send(SendBody::from_reader(body));
        self.answer(answer)
    }

    /// Opens the event stream after event `last`.
    ///
    /// # Errors
    /// Nothing answers, or the answer is a refusal.
    pub fn stream(&self, path: &str, last: Option<&str>) -> Result<BufReader<impl Read + use<>>, Failure> {
        let mut request = self
            .agent
            .get(format!("{}{path}", self.base))
            .header("Accept", "text/event-stream");
        if let Some(last) = last {
            request = request.header("Last-Event-ID", last);
        }
        match self.authorized(request).call() {
            Ok(response) if response.status().is_success() => Ok(BufReader::new(response.into_body().into_reader())),
            other => match self.answer(other)?.ok() {
                Ok(_) => Err(Failure::failed(format!(
                    "{}{path}: the answer is no event stream",
                    self.base
                ))),
                Err(failure) => Err(failure),
            },
        }
    }

    fn authorized<B>(&self, request: ureq::RequestBuilder<B>) -> ureq::RequestBuilder<B> {
        match &self.token {
            Some(token) => request.header("Authorization", format!("Bearer {token}")),
            None => request,
        }
    }

    fn answer(&self, answer: Result<Response<Body>, ureq::Error>) -> Result<Answer, Failure> {
        let mut response = answer.map_err(|error| {
            Failure::Unreachable(anyhow::anyhow!(
                "no gateway answers at {}: {error}; SEAWALL_URL names another",
                self.base
            ))
        })?;
        let status = response.status().as_u16();
        let text = response
            .body_mut()
            .with_config()
            .limit(ANSWER_BYTES_MAX)
            .read_to_string()
            .map_err(|error| Failure::failed(format!("the answer of {} broke off: {error}", self.base)))?;
        let body = match serde_json::from_str(&text) {
            Ok(body) => body,
            Err(_) if text.is_empty() => Value::Null,
            Err(_) => Value::String(text),
        };
        Ok(Answer { status, body })
    }
}

impl Answer {
    /// The body of a success, else the refusal in words.
    ///
    /// # Errors
    /// The status is not 2xx.
    pub fn ok(self) -> Result<Value, Failure> {
        if (200..300).contains(&self.status) {
            Ok(self.body)
        } else {
            Err(Failure::failed(self.refusal()))
        }
    }

    /// The refusal's code, as in `needs_confirmation`.
    pub fn code(&self) -> Option<&str> {
        self.body.get("code").and_then(Value::as_str)
    }

    /// The refusal in words.
    pub fn refusal(&self) -> String {
        let detail = ["detail", "title"]
            .iter()
            .find_map(|key| self.body.get(key).and_then(Value::as_str));
        match (self.status, detail) {
            (401, _) => "the gateway doesn't accept this token: set SEAWALL_TOKEN, or --data-dir to the directory with admin.token"
                .to_owned(),
            (status, Some(detail)) => match self.code() {
                Some(code) => format!("{detail} ({status} {code})"),
                None => format!("{detail} ({status})"),
            },
            (status, None) => format!("the gateway answered {status} {}", table::cell(&self.body)),
        }
    }
}

/// The authorities of a file, else those of the system.
fn trust(ca: Option<&Path>) -> Result<TlsConfig, Failure> {
    let authorities: Vec<CertificateDer<'_>> = match ca {
        None => rustls_native_certs::load_native_certs().certs,
        Some(path) => {
            let unusable = |problem: String| Failure::WrongUse(format!("--ca: {}: {problem}", path.display()));
            let pem = fs::read(path).map_err(|error| unusable(error.to_string()))?;
            CertificateDer::pem_slice_iter(&pem)
                .collect::<Result<Vec<_>, _>>()
                .ok()
                .filter(|authorities| !authorities.is_empty())
                .ok_or_else(|| unusable("holds no certificate as PEM".into()))?
        }
    };
    let authorities: Vec<_> = authorities
        .iter()
        .map(|der| Certificate::from_der(der).to_owned())
        .collect();
    Ok(TlsConfig::builder()
        .root_certs(RootCerts::Specific(Arc::new(authorities)))
        .unversioned_rustls_crypto_provider(tls::provider())
        .build())
}

fn token(data_dir: Option<&Path>) -> Result<Option<String>, Failure> {
    if let Ok(token) = std::env::var("SEAWALL_TOKEN")
        && !token.trim().is_empty()
    {
        return checked(token.trim(), "SEAWALL_TOKEN").map(Some);
    }
    let path = data_dir.unwrap_or(Path::new(DEFAULT_DATA_DIR)).join("admin.token");
    match fs::read_to_string(&path) {
        Ok(token) => checked(token.trim(), &path.display().to_string()).map(Some),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Failure::failed(format!("{}: {error}", path.display()))),
    }
}

/// A token goes into a header as it is.
fn checked(token: &str, source: &str) -> Result<String, Failure> {
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Failure::failed(format!("{source} holds no token")));
    }
    Ok(token.to_owned())
}
