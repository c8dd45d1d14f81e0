//! Figures of a running server: `/metrics` and `/api/v1/node`, asked ten times a second by a thread of its own.
//!
//! The one type to read is [`Sampler`]. The naive server answers `/metrics` under the gateway's names.

use std::{
    collections::BTreeMap,
    fmt,
    io::{BufRead, BufReader},
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use rustix::process::Pid;
use serde::Deserialize;
use ureq::{
    config::Config,
    http::Uri,
    tls::TlsConfig,
    unversioned::{
        resolver::{ResolvedSocketAddrs, Resolver},
        transport::{DefaultConnector, NextTimeout},
    },
};

use crate::{process, recorder::presence::Counts};

/// How often the server is asked.
pub const SAMPLE_EVERY: Duration = Duration::from_millis(100);
/// How often its open files and threads are counted.
const COUNT_EVERY: Duration = Duration::from_secs(1);
/// Counter of look-up statements.
pub const STATEMENTS: &str = "seawall_lookup_statements_total";
/// A server that has not answered by then is busy: the sample is left out, and the next one asked for.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(2);
/// Time for an import of a million devices.
const IMPORT_TIME_MAX: Duration = Duration::from_secs(600);
/// Greatest answer, in bytes.
const BODY_BYTES_MAX: u64 = 16 * 1024 * 1024;

/// The ops side of a server: base address, and the token where it asks for one.
#[derive(Clone)]
pub struct Ops {
    url: String,
    token: Option<String>,
    agent: ureq::Agent,
}

impl fmt::Debug for Ops {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ops").field("url", &self.url).finish_non_exhaustive()
    }
}

/// Answers each look-up with the same addresses.
#[derive(Debug)]
struct Pinned(Vec<SocketAddr>);

/// Addresses of a name that are tried.
const ADDRESSES_MAX: usize = 16;

impl Resolver for Pinned {
    fn resolve(&self, _: &Uri, _: &Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let mut found = self.empty();
        for address in self.0.iter().take(ADDRESSES_MAX) {
            found.push(*address);
        }
        if found.is_empty() {
            return Err(ureq::Error::HostNotFound);
        }
        Ok(found)
    }
}

/// Values of `/metrics` by their full name, labels included, as they stand in the text.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Metrics {
    values: BTreeMap<String, f64>,
}

/// One sample of the server.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sample {
    pub at: Instant,
    pub sessions: f64,
    pub in_flight: f64,
    /// None: the server has no limit.
    pub limit: Option<f64>,
    pub queue: f64,
    pub statements: f64,
    pub lookups: f64,
    pub rss_bytes: Option<u64>,
    /// Open files and sockets, and threads: of about the last second.
    pub handles: Option<u64>,
    pub threads: Option<u64>,
}

/// Answer of `/api/v1/presence`: counts of each tenant.
#[derive(Debug, Deserialize)]
struct PresenceAnswer {
    items: Vec<PresenceItem>,
}

#[derive(Debug, Deserialize)]
struct DevicePage {
    items: Vec<ListedDevice>,
    next_cursor: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ListedDevice {
    id: uuid::Uuid,
}

/// What of a node, or of an alarm, [`Ops::state`] reads.
#[derive(Debug, Deserialize)]
struct Page<T> {
    items: Vec<T>,
}

#[derive(Debug, Deserialize)]
struct NodeRow {
    sessions: u64,
}

#[derive(Debug, Deserialize)]
struct AlarmRow {
    kind: String,
    subject: String,
    severity: String,
}

/// How a gateway is: what the rule of [`harm`](crate::harm) looks at.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Sessions of all nodes, those of other devices included.
    pub sessions: u64,
    /// Active critical alarms, as `kind (subject)`.
    pub critical_alarms: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct PresenceItem {
    online: u64,
    offline: u64,
    unknown: u64,
}

/// Asks until it is dropped.
#[derive(Debug)]
pub struct Sampler {
    samples: Arc<Mutex<Vec<Sample>>>,
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Ops {
    #[must_use]
    pub fn new(url: &str, token: Option<String>) -> Self {
        let agent = ureq::Agent::config_builder()
            .timeout_global(Some(ANSWER_TIME_MAX))
            .http_status_as_error(false)
            .proxy(None)
            .build()
            .into();
        Self {
            url: url.trim_end_matches('/').to_owned(),
            token,
            agent,
        }
    }

    /// A server that runs already, at these addresses whatever its name leads to later. It is asked nowhere else:
    /// redirects are not followed.
    #[must_use]
    pub fn pinned(url: &str, token: String, addresses: Vec<SocketAddr>, tls: Option<TlsConfig>) -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(ANSWER_TIME_MAX))
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .tls_config(tls.unwrap_or_default())
            .build();
        Self {
            url: url.trim_end_matches('/').to_owned(),
            token: Some(token),
            agent: ureq::Agent::with_parts(config, DefaultConnector::default(), Pinned(addresses)),
        }
    }

    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    #[must_use]
    pub fn token(&self) -> Option<&str> {
        self.token.as_deref()
    }

    /// Blocks.
    ///
    /// # Errors
    /// No answer in time, or none of 200.
    pub fn metrics(&self) -> Result<Metrics> {
        Ok(Metrics::parse(&self.get("/metrics")?))
    }

    /// Blocks. In flight and limit as `/api/v1/node` has them: both of one moment.
    ///
    /// # Errors
    /// No answer in time, none of 200, or no such fields.
    pub fn admission(&self) -> Result<(f64, f64)> {
        let node: serde_json::Value =
            serde_json::from_str(&self.get("/api/v1/node")?).context("reading the node's state")?;
        let figure = |name: &str| {
            node.pointer(&format!("/admission/{name}"))
                .and_then(serde_json::Value::as_f64)
                .with_context(|| format!("no admission.{name} in the node's state"))
        };
        Ok((figure("in_flight")?, figure("limit")?))
    }

    /// Blocks. Published numbers of devices by state, over all tenants.
    ///
    /// # Errors
    /// No answer in time, none of 200, or no such fields.
    pub fn presence(&self) -> Result<Counts> {
        let answer = self.get("/api/v1/presence?by=tenant")?;
        let answer: PresenceAnswer = serde_json::from_str(&answer).context("reading the counts of presence")?;
        Ok(answer.items.into_iter().fold(Counts::default(), |sum, item| Counts {
            online: sum.online + item.online,
            offline: sum.offline + item.offline,
            unknown: sum.unknown + item.unknown,
        }))
    }

    /// The devices that are listed as unknown.
    ///
    /// # Errors
    /// No answer, or one that is not understood.
    pub fn unknown_devices(&self) -> Result<Vec<uuid::Uuid>> {
        let mut found = Vec::new();
        let mut cursor = String::new();
        loop {
            let answer = self.get(&format!("/api/v1/devices?state=unknown&limit=1000{cursor}"))?;
            let page: DevicePage = serde_json::from_str(&answer).context("reading a page of devices")?;
            found.extend(page.items.into_iter().map(|item| item.id));
            match page.next_cursor {
                Some(next) => cursor = format!("&cursor={next}"),
                None => return Ok(found),
            }
        }
    }

    /// Blocks. Opens the stream of events, after the event of this id if one is given.
    ///
    /// # Errors
    /// No answer in time, or none of 200.
    pub fn events(&self, after: Option<&str>) -> Result<impl BufRead + use<>> {
        let path = "/api/v1/events";
        let request = self.with_token(self.agent.get(format!("{}{path}", self.url)));
        let request = match after {
            Some(id) => request.header("Last-Event-ID", id),
            None => request,
        };
        let request = request
            .config()
            .timeout_global(None)
            .timeout_recv_response(Some(ANSWER_TIME_MAX))
            .build();
        let answer = request.call().with_context(|| format!("asking {}{path}", self.url))?;
        ensure!(answer.status().is_success(), "{path} answered {}", answer.status());
        Ok(BufReader::new(answer.into_body().into_reader()))
    }

    /// Blocks. Status and body of any answer. `shows_token`: not before it is known who is asked.
    ///
    /// # Errors
    /// No answer in time.
    pub fn answer(&self, path: &str, shows_token: bool) -> Result<(u16, String), ureq::Error> {
        let mut request = self.agent.get(format!("{}{path}", self.url));
        if shows_token {
            request = self.with_token(request);
        }
        let mut answer = request.call()?;
        let status = answer.status().as_u16();
        let body = answer.body_mut().with_config().limit(BODY_BYTES_MAX).read_to_string()?;
        Ok((status, body))
    }

    /// Blocks.
    ///
    /// # Errors
    /// No answer in time, none of 200, or no such fields.
    pub fn state(&self) -> Result<State> {
        let nodes: Page<NodeRow> =
            serde_json::from_str(&self.get("/api/v1/nodes?limit=1000")?).context("reading the nodes")?;
        let alarms: Page<AlarmRow> =
            serde_json::from_str(&self.get("/api/v1/alarms?limit=1000")?).context("reading the alarms")?;
        let critical = alarms.items.into_iter().filter(|alarm| alarm.severity == "critical");
        Ok(State {
            sessions: nodes.items.iter().map(|node| node.sessions).sum(),
            critical_alarms: critical
                .map(|alarm| format!("{} ({})", alarm.kind, alarm.subject))
                .collect(),
        })
    }

    /// Blocks. Connected devices that a rule on this range would match now.
    ///
    /// # Errors
    /// It was refused, or there was no answer in time.
    pub fn preview(&self, range: &str) -> Result<u64> {
        let path = "/api/v1/rules/preview";
        let rule = serde_json::json!({"match": {"firmware": range}, "effect": "block", "reason": "load test"});
        let request = self.with_token(self.agent.post(format!("{}{path}", self.url)));
        let answer = request
            .send_json(&rule)
            .with_context(|| format!("previewing a rule at {}", self.url))?;
        let answer: serde_json::Value = serde_json::from_str(&read(path, answer)?).context("reading the preview")?;
        let connected = answer.get("connected").and_then(serde_json::Value::as_u64);
        connected.context("no `connected` in the preview of a rule")
    }

    /// Blocks. Does the server take devices now?
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.get("/readyz").is_ok()
    }

    /// Blocks. Registers devices, in the form that `devices import` reads.
    ///
    /// # Errors
    /// They were refused, or there was no answer in time.
    pub fn import(&self, csv: &str) -> Result<()> {
        let path = "/api/v1/devices/import";
        let request = self
            .agent
            .post(format!("{}{path}", self.url))
            .header("Content-Type", "text/csv");
        let request = self
            .with_token(request)
            .config()
            .timeout_global(Some(IMPORT_TIME_MAX))
            .build();
        read(
            path,
            request
                .send(csv)
                .with_context(|| format!("importing at {}", self.url))?,
        )
        .map(drop)
    }

    /// Blocks. Makes a rule that blocks; returns its id. `expires_after`: it ends by itself then, whatever becomes of
    /// this process.
    ///
    /// # Errors
    /// It was refused, or there was no answer in time.
    pub fn block(
        &self,
        range: &str,
        reason: &str,
        evict: bool,
        retry_after: Option<&str>,
        expires_after: Option<Duration>,
    ) -> Result<String> {
        let path = "/api/v1/rules";
        let mut rule = serde_json::json!({
            "match": {"firmware": range}, "effect": "block", "reason": reason, "evict": evict, "confirm": true,
        });
        if let Some(retry_after) = retry_after {
            rule["retry_after"] = retry_after.into();
        }
        if let Some(after) = expires_after {
            let at = std::time::SystemTime::now() + after;
            rule["expires_at"] = humantime::format_rfc3339_seconds(at).to_string().into();
        }
        let request = self.with_token(self.agent.post(format!("{}{path}", self.url)));
        let answer = request
            .send_json(&rule)
            .with_context(|| format!("making a rule at {}", self.url))?;
        let answer: serde_json::Value = serde_json::from_str(&read(path, answer)?).context("reading the new rule")?;
        let id = answer
            .get("id")
            .or_else(|| answer.pointer("/rule/id"))
            .and_then(serde_json::Value::as_str);
        id.map(str::to_owned).context("no id in the answer to a new rule")
    }

    /// Blocks. Removes a rule.
    ///
    /// # Errors
    /// It was refused, or there was no answer in time.
    pub fn remove_rule(&self, id: &str) -> Result<()> {
        let path = format!("/api/v1/rules/{id}");
        let request = self.with_token(self.agent.delete(format!("{}{path}", self.url)));
        read(
            &path,
            request
                .call()
                .with_context(|| format!("removing a rule at {}", self.url))?,
        )
        .map(drop)
    }

    fn get(&self, path: &str) -> Result<String> {
        let request = self.with_token(self.agent.get(format!("{}{path}", self.url)));
        read(
            path,
            request.call().with_context(|| format!("asking {}{path}", self.url))?,
        )
    }

    fn with_token<B>(&self, request: ureq::RequestBuilder<B>) -> ureq::RequestBuilder<B> {
        match &self.token {
            Some(token) => request.header("Authorization", format!("Bearer {token}")),
            None => request,
        }
    }
}

/// The body of an answer of success.
fn read(path: &str, mut answer: ureq::http::Response<ureq::Body>) -> Result<String> {
    let status = answer.status();
    let body = answer
        .body_mut()
        .with_config()
        .limit(BODY_BYTES_MAX)
        .read_to_string()
        .with_context(|| format!("reading the answer of {path}"))?;
    ensure!(status.is_success(), "{path} answered {status}: {}", body.trim());
    Ok(body)
}

impl Metrics {
    /// Lines of the text format; anything that is not a value (comments, timestamps behind it) is passed over.
    #[must_use]
    pub fn parse(text: &str) -> Self {
        let values = text
            .lines()
            .filter(|line| !line.starts_with('#'))
            .filter_map(|line| {
                // Label values may hold spaces: the name ends behind the bracket.
                let at = line.rfind('}').map_or_else(|| line.find(' '), |at| Some(at + 1))?;
                let (name, rest) = line.split_at_checked(at)?;
                let value = rest.split_ascii_whitespace().next()?.parse().ok()?;
                Some((name.to_owned(), value))
            })
            .collect();
        Self { values }
    }

    /// Sum of a metric over all its labels. 0 where there is none: a counter that never counted.
    #[must_use]
    pub fn sum(&self, name: &str) -> f64 {
        self.series(name).map(|(_, value)| value).sum()
    }

    /// A metric without labels.
    #[must_use]
    pub fn value(&self, name: &str) -> Option<f64> {
        self.values.get(name).copied()
    }

    /// A metric's values with their labels, as text between the brackets.
    pub fn series<'a>(&'a self, name: &'a str) -> impl Iterator<Item = (&'a str, f64)> {
        self.values
            .range(name.to_owned()..)
            .map_while(move |(full, value)| {
                let rest = full.strip_prefix(name)?;
                Some((rest, *value))
            })
            .filter_map(|(rest, value)| {
                if rest.is_empty() {
                    return Some(("", value));
                }
                Some((rest.strip_prefix('{')?.strip_suffix('}')?, value))
            })
    }
}

/// The value of one label among those of [`Metrics::series`], unescaped.
#[must_use]
pub fn label(labels: &str, name: &str) -> Option<String> {
    let mut rest = labels;
    loop {
        let (key, behind) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut characters = behind.char_indices();
        let end = loop {
            match characters.next()? {
                (_, '\\') => value.push(match characters.next()?.1 {
                    'n' => '\n',
                    other => other,
                }),
                (at, '"') => break at,
                (_, other) => value.push(other),
            }
        };
        if key.trim_start_matches(',') == name {
            return Some(value);
        }
        rest = behind.get(end + 1..)?;
    }
}

impl Sampler {
    /// `pid`: the server's process, where it is one of this machine.
    #[must_use]
    pub fn start(ops: Ops, pid: Option<Pid>) -> Self {
        let samples = Arc::new(Mutex::new(Vec::new()));
        let ends = Arc::new(AtomicBool::new(false));
        let thread = std::thread::spawn({
            let (samples, ends) = (Arc::clone(&samples), Arc::clone(&ends));
            move || {
                let (mut counted, mut count_at) = (None, Instant::now());
                while !ends.load(Ordering::Relaxed) {
                    let started = Instant::now();
                    if started >= count_at {
                        // Thousands of sockets take milliseconds to list.
                        count_at = started + COUNT_EVERY;
                        counted = pid.and_then(process::handles_and_threads);
                    }
                    if let Ok(mut sample) = take(&ops, pid) {
                        (sample.handles, sample.threads) = (counted.map(|of| of.0), counted.map(|of| of.1));
                        samples.lock().unwrap_or_else(PoisonError::into_inner).push(sample);
                    }
                    std::thread::sleep(SAMPLE_EVERY.saturating_sub(started.elapsed()));
                }
            }
        });
        Self {
            samples,
            ends,
            thread: Some(thread),
        }
    }

    /// The newest.
    #[must_use]
    pub fn last(&self) -> Option<Sample> {
        self.samples
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .last()
            .copied()
    }

    /// All so far.
    #[must_use]
    pub fn all(&self) -> Vec<Sample> {
        self.samples.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            drop(thread.join()); // a sampler that failed has no more samples, and nothing else to say
        }
    }
}

fn take(ops: &Ops, pid: Option<Pid>) -> Result<Sample> {
    let metrics = ops.metrics()?;
    let mut in_flight = metrics.sum("seawall_lookups_in_flight");
    let mut limit = metrics.value("seawall_admission_limit");
    if let Ok((node_in_flight, node_limit)) = ops.admission() {
        // The metrics' two figures are not of one moment; of these the worse for the server counts.
        in_flight = in_flight.max(node_in_flight);
        limit = Some(limit.map_or(node_limit, |limit| limit.max(node_limit)));
    }
    Ok(Sample {
        at: Instant::now(),
        sessions: metrics.sum("seawall_sessions"),
        in_flight,
        limit,
        queue: metrics.sum("seawall_admission_queue"),
        statements: metrics.sum(STATEMENTS),
        lookups: metrics.sum("seawall_lookups_total"),
        rss_bytes: pid.and_then(process::resident_bytes),
        handles: None,
        threads: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = r#"# HELP seawall_sessions Open sessions.
# TYPE seawall_sessions gauge
seawall_sessions 12
seawall_handshakes_total{outcome="admitted"} 10
seawall_handshakes_total{outcome="overloaded"} 2.5e1
seawall_handshakes_total_created 7
seawall_cohort_sessions{cohort="a \"b\", c/3.8.0-b2"} 4
seawall_cohort_sessions{x="1",cohort="other"} 3 1700000000
"#;

    #[test]
    fn metrics_are_read_with_their_labels() {
        let metrics = Metrics::parse(TEXT);

        assert_eq!(metrics.value("seawall_sessions"), Some(12.0));
        assert_eq!(metrics.sum("seawall_handshakes_total"), 35.0);
        assert_eq!(metrics.sum("seawall_never_total"), 0.0);
        let cohorts: Vec<_> = metrics
            .series("seawall_cohort_sessions")
            .map(|(labels, value)| (label(labels, "cohort").unwrap(), value))
            .collect();
        assert_eq!(
            cohorts,
            [("a \"b\", c/3.8.0-b2".to_owned(), 4.0), ("other".to_owned(), 3.0)]
        );
        assert_eq!(label("a=\"b\"", "c"), None);
    }
}
