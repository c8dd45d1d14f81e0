//! The API as the command line sees it: one request, one answer, and what refusals mean in words.

use std::{
    fs,
    io::{self, BufReader, Read},
    net::{IpAddr, SocketAddr, TcpStream, ToSocketAddrs as _},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use rustls::pki_types::{CertificateDer, pem::PemObject};
use serde_json::Value;
use ureq::{
    Agent, Body, SendBody,
    http::Response,
    tls::{Certificate, RootCerts, TlsConfig},
};

use super::{Common, Failure, note, table};
use crate::tls;

/// Where a gateway's API is unless `SEAWALL_URL` says otherwise.
pub const DEFAULT_URL: &str = "http://127.0.0.1:8081";
/// Where a gateway's files are unless `SEAWALL_DATA_DIR` says otherwise.
pub const DEFAULT_DATA_DIR: &str = "./seawall-data";

/// `source` of an answer that comes from a gateway's memory, because its database does not answer.
pub const MEMORY: &str = "memory";

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longer than the gateway gives any request of its own.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// An import of a million lines is one transaction.
const UPLOAD_TIMEOUT: Duration = Duration::from_secs(3_600);
/// Greatest answer that is read: a page of 1,000 rows is far below it.
const ANSWER_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Rows asked for in one request.
const PAGE_LEN: usize = 500;
/// Time that a gateway on this machine has to begin to listen, so that a command may follow `seawall serve &` at once.
const START_WAIT_MAX: Duration = Duration::from_secs(3);
/// Pause between two checks of that.
const START_WAIT_STEP: Duration = Duration::from_millis(50);

/// One gateway's API, and the token for it.
pub struct Client {
    agent: Agent,
    base: String,
    token: Token,
    /// Whether a gateway of this machine that does not listen yet is waited for.
    awaits_start: bool,
}

/// The access token, or why there is none.
enum Token {
    Known(String),
    /// Says where it was looked for.
    Missing(String),
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

/// An answer that is not a success.
#[derive(Debug)]
pub struct Refusal {
    pub status: u16,
    /// An error in the API's form, unless something else than a gateway answered.
    pub body: Value,
    /// For people.
    pub text: String,
}

impl Refusal {
    /// Whether a value that the command line gave is wrong. The lines of a file are not the command line's.
    pub fn is_wrong_use(&self) -> bool {
        matches!(self.status, 400 | 422) && self.body.get("bad_lines").is_none()
    }
}

impl Client {
    /// Finds the token: `SEAWALL_TOKEN`, else `admin.token` in the data directory, else none. The file's token is only sent to the
    /// gateway of that directory and to addresses of this machine.
    ///
    /// # Errors
    /// The URL is not that of an API, or the token file or the file of authorities can't be read.
    pub fn new(common: &Common) -> Result<Self, Failure> {
        Self::with(common, true)
    }

    /// The same for a check of what is there now: it waits for no gateway to start.
    ///
    /// # Errors
    /// As for [`Self::new`].
    pub fn for_check(common: &Common) -> Result<Self, Failure> {
        Self::with(common, false)
    }

    fn with(common: &Common, awaits_start: bool) -> Result<Self, Failure> {
        let base = common.url.trim_end_matches('/').to_owned();
        // It would stand in messages, and in the list of processes.
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
            // A proxy of the environment is for the web, not for a gateway on loopback or in a private network.
            .proxy(None)
            .timeout_connect(Some(CONNECT_TIMEOUT));
        let config = if is_tls {
            config.tls_config(trust(common.ca.as_deref())?).build()
        } else {
            config.build()
        };
        Ok(Self {
            token: token(common.data_dir.as_deref(), &base, awaits_start)?,
            agent: config.into(),
            base,
            awaits_start,
        })
    }

    /// Waits for the gateway, where that was asked for.
    fn await_start(&self) {
        if self.awaits_start {
            await_start(&self.base);
        }
    }

    /// Why there is no token, where there is none.
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

    /// Reads up to `wanted` rows of a list, page by page. Its `source` is [`MEMORY`] if that of any page is.
    ///
    /// # Errors
    /// Nothing answers, or an answer is a refusal.
    pub fn list(&self, path: &str, query: &[(&str, String)], wanted: usize) -> Result<Value, Failure> {
        let mut query = query.to_vec();
        let mut items = Vec::new();
        let mut source = Value::Null;
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
            // A page may be shorter than asked for, even empty, before the end of the list.
            match page.get("next_cursor").and_then(Value::as_str) {
                Some(cursor) if items.len() < wanted => {
                    query.retain(|(name, _)| *name != "cursor");
                    query.push(("cursor", cursor.to_owned()));
                }
                cursor => {
                    let mut list = serde_json::json!({"items": items, "next_cursor": cursor});
                    // Only some lists have it.
                    if !source.is_null() {
                        list["source"] = source;
                    }
                    return Ok(list);
                }
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
            .map_err(|error| Failure::failed(format!("the answer of {} broke off: {error}", self.base)))?;
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
                "{} speaks TLS: set SEAWALL_URL or --url to an address with https://",
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

/// Waits until a gateway on this machine listens, for at most 3 s. Elsewhere a refused connection is final.
fn await_start(base: &str) {
    let addresses = loopback_addresses(base);
    if addresses.is_empty() {
        return;
    }
    let end = Instant::now() + START_WAIT_MAX;
    while TcpStream::connect(&addresses[..]).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
        && Instant::now() < end
    {
        std::thread::sleep(START_WAIT_STEP);
    }
}

/// What went wrong, in the words of who typed the address.
fn unreachable(error: &ureq::Error) -> String {
    let text = error.to_string();
    if text.contains("InvalidContentType") {
        return "it does not speak TLS: use http://".to_owned();
    }
    text
}

/// The answer of a listener with TLS to plain HTTP.
fn is_from_tls_listener(detail: &str) -> bool {
    detail.starts_with("TLS is spoken here")
}

/// The device listener's answer to a path that is not for devices.
fn is_from_device_listener(detail: &str) -> bool {
    detail.starts_with("devices connect at ")
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
            let text = self.refusal();
            Err(self.refused(text))
        }
    }

    /// The refusal, with `text` for people.
    pub fn refused(self, text: String) -> Failure {
        let Self { status, body } = self;
        Failure::Refused(Box::new(Refusal { status, body, text }))
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

fn token(data_dir: Option<&Path>, base: &str, awaits_start: bool) -> Result<Token, Failure> {
    if let Ok(token) = std::env::var("SEAWALL_TOKEN")
        && !token.trim().is_empty()
    {
        if base.starts_with("http://") && !is_of_this_machine(base) {
            note(&format!(
                "warning: SEAWALL_TOKEN crosses the network in clear text to {base}: use https://"
            ));
        }
        return checked(token.trim(), "SEAWALL_TOKEN").map(Token::Known);
    }
    let folder = data_dir.unwrap_or(Path::new(DEFAULT_DATA_DIR));
    let path = folder.join("admin.token");
    if !is_of_this_machine(base) && !is_ops_address_of(folder, base) {
        return Ok(Token::Missing(format!(
            "no token for {base}: set SEAWALL_TOKEN. The token in {} is only sent to the gateway of that directory",
            path.display()
        )));
    }
    if awaits_start && !path.exists() {
        // The first start makes the file before it listens.
        await_start(base);
    }
    match fs::read_to_string(&path) {
        Ok(token) => checked(token.trim(), &path.display().to_string()).map(Token::Known),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Token::Missing(format!(
            "no token: SEAWALL_TOKEN is not set, and {} does not exist (--data-dir names the gateway's data directory)",
            path.display()
        ))),
        Err(error) => Err(Failure::failed(format!("{}: {error}", path.display()))),
    }
}

/// Host and port of an API address.
fn authority(base: &str) -> &str {
    let rest = base.split_once("://").map_or(base, |(_, rest)| rest);
    rest.split('/').next().unwrap_or(rest)
}

/// Whether an API address is one of this machine's own, whatever the network.
fn is_of_this_machine(base: &str) -> bool {
    let authority = authority(base);
    let host = authority.rsplit_once(':').map_or(authority, |(host, port)| {
        if port.bytes().all(|byte| byte.is_ascii_digit()) {
            host
        } else {
            authority
        }
    });
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host.eq_ignore_ascii_case("localhost") || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The socket addresses of an API on loopback; none elsewhere. `localhost` may have two, and the gateway listens on one of them.
fn loopback_addresses(base: &str) -> Vec<SocketAddr> {
    if !is_of_this_machine(base) {
        return Vec::new();
    }
    authority(base)
        .to_socket_addrs()
        .map_or_else(|_| Vec::new(), Iterator::collect)
}

/// Whether the gateway of a data directory said that its API is at this address.
fn is_ops_address_of(data_dir: &Path, base: &str) -> bool {
    let Ok(text) = fs::read_to_string(data_dir.join("addresses.json")) else {
        return false;
    };
    serde_json::from_str::<Value>(&text).is_ok_and(|addresses| {
        addresses.get("ops").and_then(Value::as_str) == Some(authority(base)) && base.starts_with("https://")
    })
}

/// A token goes into a header as it is.
fn checked(token: &str, source: &str) -> Result<String, Failure> {
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(Failure::failed(format!("{source} does not hold a token")));
    }
    Ok(token.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_of_a_data_directory_is_only_sent_to_its_gateway() {
        let home = tempfile::tempdir().unwrap();
        fs::write(home.path().join("admin.token"), "secret\n").unwrap();
        fs::write(
            home.path().join("addresses.json"),
            r#"{"devices":"0.0.0.0:1","ops":"192.0.2.7:8081"}"#,
        )
        .unwrap();
        let is_sent_to = |base: &str| matches!(token(Some(home.path()), base, false).unwrap(), Token::Known(_));

        for own in [
            "http://127.0.0.1:8081",
            "http://localhost:1",
            "https://[::1]:8081",
            "https://192.0.2.7:8081",
        ] {
            assert!(is_sent_to(own), "{own}");
        }
        for other in [
            "http://192.0.2.7:8081",
            "https://gw-7.example",
            "http://127.0.0.1.example:8081",
            "http://localhost.example",
        ] {
            assert!(!is_sent_to(other), "{other}");
        }
    }

    #[test]
    fn command_waits_for_a_gateway_of_this_machine_that_does_not_listen_yet() {
        let address = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap();
        let client = Client {
            agent: Agent::new_with_defaults(),
            base: format!("http://{address}"),
            token: Token::Missing(String::new()),
            awaits_start: true,
        };

        let starts_late = std::thread::spawn(move || {
            std::thread::sleep(START_WAIT_STEP * 4);
            std::net::TcpListener::bind(address).unwrap()
        });
        client.await_start();

        assert!(
            TcpStream::connect(address).is_ok(),
            "it listens when the command goes on"
        );
        drop(starts_late.join().unwrap());
    }

    #[test]
    fn every_address_of_localhost_is_tried() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();

        let addresses = loopback_addresses(&format!("http://localhost:{port}"));

        assert!(
            addresses.contains(&SocketAddr::from(([127, 0, 0, 1], port))),
            "{addresses:?}"
        );
        // As where the first address of `localhost` is IPv6's.
        let began = Instant::now();
        await_start(&format!("http://localhost:{port}"));
        assert!(began.elapsed() < START_WAIT_MAX / 2);
        assert_eq!(loopback_addresses("http://gw-7.example:8081"), []);
    }

    #[test]
    fn missing_token_is_said_with_the_place_where_it_was_looked_for() {
        let home = tempfile::tempdir().unwrap();

        let Token::Missing(reason) = token(Some(home.path()), DEFAULT_URL, false).unwrap() else {
            panic!("there is no file");
        };

        assert!(
            reason.contains("SEAWALL_TOKEN is not set") && reason.contains("admin.token does not exist"),
            "{reason}"
        );
    }
}
