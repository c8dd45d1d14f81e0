//! The sections of the configuration that are the gateway's own. Start with [`Limits`].
//!
//! `[identity]` and `[admission]` are policy and live in `seawall_proto`.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use seawall_proto::{cohorts::Mode, hello::Paths, resume::LIFE_MAX};
use serde::{Deserialize, Serialize};

use super::{section::section, url::DatabaseUrl};

section! {
    /// Configuration that nodes share, from one or two URLs with the same TOML file. The file of a node, its
    /// environment and its flags override it. It may have every setting but `[source]` and `server.data_dir`. Whatever
    /// a URL answers, the configuration in use stays until a complete, valid and other one arrives. It is kept in
    /// `shared-config.toml` of the data directory for the next start. `seawall_config_fetches_total` counts the
    /// answers.
    pub struct SourceSettings = "source" {
        /// One or two URLs: `https://…`, or `http://…` on this machine. The second is asked where the first does not
        /// answer as it should; the one that did is asked first the next time. ETags are used, redirects are not
        /// followed. A token may stand in the path or the query: only scheme and host are logged.
        pub urls: Vec<String> = Vec::new();
        /// Time between two requests, drawn between 90 % and 110 % of it: a number of seconds, or text such as `"30s"`.
        #[serde(deserialize_with = "super::seconds")]
        pub refresh: u64 = 30, "s", 5..=3_600;
    }
}

impl SourceSettings {
    /// A problem of the URLs.
    #[must_use]
    pub fn mismatch(&self) -> Option<&'static str> {
        if self.urls.len() > 2 {
            return Some("expected one or two URLs");
        }
        let uris = self.urls.iter().map(|url| url.parse::<ureq::http::Uri>().ok());
        uris.into_iter().find_map(|uri| {
            let uri = uri.as_ref();
            let parts = uri.and_then(|uri| Some((uri.scheme_str()?, uri.host().filter(|host| !host.is_empty())?)));
            let authority = uri.and_then(ureq::http::Uri::authority);
            let has_name = authority.is_some_and(|authority| authority.as_str().contains('@'));
            match parts {
                Some(("https" | "http", _)) if has_name => Some("expected a URL without a name and a password"),
                Some(("https", _)) => None,
                Some(("http", host)) if is_loopback(host) => None,
                Some(("http", _)) => {
                    Some("would cross the network in clear text: use https://, or a server on this machine")
                }
                Some(_) | None => Some("expected https://HOST/PATH"),
            }
        })
    }
}

section! {
    /// Device listener and files.
    pub struct Server = "server" {
        /// Address for devices: `IP:PORT`, `HOST:PORT` or `:PORT`. Of a host, the first address is used, IPv4 before
        /// IPv6. `:PORT` is every IPv4 address. Port 0 takes a free one, which is written to `addresses.json` in the
        /// data directory. Flag `--listen`, environment `SEAWALL_LISTEN`.
        #[serde(deserialize_with = "super::listen::deserialize")]
        pub listen: SocketAddr = SocketAddr::from((Ipv4Addr::LOCALHOST, 8080));
        /// Paths at which devices connect, 1 to 16. A segment `{device}` is one more source of the device id: after
        /// headers and the Basic user name, before the query. It is percent-decoded. Repeated slashes count as one.
        pub paths: Paths = Paths::default();
        /// Allows several gateways of this user on one address (SO_REUSEPORT). Each needs its own data directory and
        /// `ops.listen`; the kernel spreads devices over them. A full gateway stops listening until it has room again.
        pub share_port: bool = false;
        /// Directory for the database (SQLite), keys, the admin token and `addresses.json`. It is created if missing,
        /// and used by one gateway at a time. Flag `--data-dir`, environment `SEAWALL_DATA_DIR`.
        pub data_dir: PathBuf = PathBuf::from("./seawall-data");
        /// Name of this node in the API, logs and events: 1 to 64 bytes of printable ASCII. Not given: the name of the
        /// host.
        pub node: Option<String> = None;
        /// Memory that the gateway may use, at least 64 MiB. It includes sockets in the kernel (about 5 KiB per
        /// device). 0: what the cgroup allows, else what the machine has. If less than 10 % is left (at least 24 MiB,
        /// at most 512 MiB), new devices are refused with 503 `overloaded` and a slot. They are admitted again once 5 %
        /// more is free; live sessions stay. `/readyz` (`memory_short`), an alarm and `seawall_memory_bytes` report it.
        /// A cgroup's own limit always applies as well. Flag `--max-memory`, environment `SEAWALL_MAX_MEMORY`; these
        /// also take `512M` or `2G` (powers of 1,024).
        pub max_memory_bytes: u64 = 0, "bytes", 0..=1 << 50;
    }
}

section! {
    /// TLS for devices, versions 1.2 and 1.3. Files are loaded again at SIGHUP, and within ten seconds of a change.
    /// Sessions stay. Files that cannot be used change nothing; the log, `seawall_tls_reloads_total`, `/readyz`
    /// (`tls_files`) and an alarm report them.
    pub struct TlsSettings = "tls" {
        /// PEM file with the certificate, then its intermediates; ECDSA P-256 costs least. Not given: plain TCP. Flag
        /// `--tls-cert`, environment `SEAWALL_TLS_CERT`.
        pub certificate: Option<PathBuf> = None;
        /// PEM file with the key of the certificate. Flag `--tls-key`, environment `SEAWALL_TLS_KEY`.
        pub key: Option<PathBuf> = None;
        /// Time for a TLS handshake; then the connection is closed. The head of the request has its own time.
        pub handshake_timeout_ms: u64 = 5_000, "milliseconds", 100..=60_000;
        /// PEM file with the CAs of client certificates. A certificate that names a UUID is id and credential of that
        /// device. The UUID is in a URI (`urn:uuid:…`, or at its end), in the first label of a DNS name, or in the
        /// common name. Not given: client certificates are not requested.
        pub client_ca: Option<PathBuf> = None;
        /// PEM file with revocation lists: one from every CA that issues client certificates, and from the CAs above
        /// those. New connections are rejected if their certificate is on a list, or if its CA has none. So are
        /// certificates below an intermediate that is on a list. A new list also closes the sessions of the
        /// certificates that it names, with 4003, but none below a revoked intermediate. An intermediate whose issuer
        /// has no list here is not checked: `seawall doctor` names those. A list past its next update stays in use.
        /// `/readyz` (`revocation_list_out_of_date`), an alarm and `seawall_tls_revocation_list_expires_seconds` report
        /// it.
        pub client_crl: Option<PathBuf> = None;
        /// Ends handshakes of clients without a certificate, including probes of load balancers.
        pub client_certificate_required: bool = false;
    }
}

impl TlsSettings {
    /// [`Self::handshake_timeout_ms`] as a span.
    #[must_use]
    pub const fn handshake_timeout(&self) -> Duration {
        Duration::from_millis(self.handshake_timeout_ms)
    }

    /// The setting that contradicts another, and the problem.
    pub(super) fn mismatch(&self) -> Option<(&'static str, &'static str)> {
        match (&self.certificate, &self.key) {
            (Some(_), None) => return Some(("tls.key", "is missing beside tls.certificate")),
            (None, Some(_)) => return Some(("tls.certificate", "is missing beside tls.key")),
            (Some(_), Some(_)) | (None, None) => {}
        }
        if self.client_ca.is_some() && self.certificate.is_none() {
            return Some(("tls.client_ca", "needs tls.certificate and tls.key"));
        }
        if self.client_ca.is_none() && self.client_crl.is_some() {
            return Some(("tls.client_crl", "needs tls.client_ca"));
        }
        if self.client_ca.is_none() && self.client_certificate_required {
            return Some(("tls.client_certificate_required", "needs tls.client_ca"));
        }
        None
    }
}

section! {
    /// Load balancers in front of the device listener, so that limits by address see devices and not the load balancer.
    pub struct ProxySettings = "proxy" {
        /// Addresses and networks of load balancers, such as `10.0.0.0/8`. An IPv4 network may be written as IPv6
        /// (`::ffff:10.0.0.0/104`). No other address is trusted to name its client.
        pub trusted: Vec<String> = Vec::new();
        /// Requires a header of the PROXY protocol, version 1 or 2, at the start of every connection from a trusted
        /// address, before TLS. Connections without one are closed.
        pub protocol: bool = false;
        /// Uses `X-Forwarded-For` of requests from a trusted address: the last address in it that is not trusted.
        pub forwarded_for: bool = false;
    }
}

section! {
    /// The API, metrics and health checks.
    pub struct Ops = "ops" {
        /// Address of the API: `IP:PORT`, `HOST:PORT` or `:PORT`, as for `server.listen`. Port 0 takes a free one. Flag
        /// `--ops-listen`, environment `SEAWALL_OPS_LISTEN`.
        #[serde(deserialize_with = "super::listen::deserialize")]
        pub listen: SocketAddr = SocketAddr::from((Ipv4Addr::LOCALHOST, 8081));
        /// PEM file with the certificate of the API, then its intermediates. Not given: plain HTTP.
        pub tls_certificate: Option<PathBuf> = None;
        /// PEM file with the key of that certificate.
        pub tls_key: Option<PathBuf> = None;
        /// Allows an address outside loopback without TLS, although tokens then cross the network in clear text. Flag
        /// `--insecure-ops`.
        pub insecure: bool = false;
        /// Time for one API request, imports and event streams excepted; then 503.
        pub request_timeout_ms: u64 = 30_000, "milliseconds", 1_000..=600_000;
        /// Maximum body of a request, imports excepted; then 413.
        pub body_bytes_max: usize = 256 * 1024, "bytes", 16_384..=16_777_216;
        /// Maximum number of API calls with a token at a time, one per connection; then 503. Idle connections make way
        /// for new ones.
        pub connections_max: usize = 256, "connections", 8..=10_000;
        /// Maximum number of readers of the event stream; then 503.
        pub event_readers_max: usize = 32, "readers", 1..=1_000;
    }
}

section! {
    /// The registry of devices, rules, tokens and the audit log.
    pub struct Database = "database" {
        /// `postgres://USER:PASSWORD@HOST/NAME` or `sqlite:PATH`. Not given: `seawall.db` in the data directory,
        /// SQLite. Special characters of the password are percent-encoded. Parameters: `sslmode` (default `prefer`,
        /// which verifies nothing; use `verify-full`), `sslrootcert`, `sslcert`, `sslkey`, `connect_timeout` (seconds,
        /// 1 to 60, default 3), `host`, `hostaddr`, `port`, `user`, `password`, `dbname`, `options`. Any other
        /// parameter, and a file for TLS that cannot be read, stops the start. Of SQLite, `?mode=rwc` is accepted and
        /// changes nothing. Flag `--database`, environment `SEAWALL_DATABASE`.
        pub url: Option<DatabaseUrl> = None;
    }
}

section! {
    /// Limits of one gateway, one connection and one message. Each says what happens when it is reached.
    pub struct Limits = "limits" {
        /// Maximum number of device connections. 0: as many as memory and the limit on open files allow. One more is
        /// answered 503 `overloaded`, with a slot.
        pub connections_max: usize = 0, "connections", 0..=10_000_000;
        /// Maximum number of handshakes under way, from accept to a complete head; more wait in the listen backlog.
        /// While some wait, a handshake without a head after 10 ms is parked, and not counted here. Parked handshakes
        /// that have sent something: up to eight for each of these. Silent ones: up to four for each free connection.
        /// It is never more than half of the connections, nor than fit into the memory that a full node keeps free.
        /// Each of these needs 288 KiB there (85 with 128 MiB). Devices that wait for a lookup have their own limit, in
        /// `[admission]`.
        pub handshakes_max: usize = 500, "connections", 8..=100_000;
        /// Maximum head of a device's request, and maximum target in it; then 431 and 414.
        pub head_bytes_max: usize = 8 * 1024, "bytes", 1_024..=65_536;
        /// Time for a complete head; then 408.
        pub head_timeout_ms: u64 = 5_000, "milliseconds", 100..=60_000;
        /// Time for writing a refusal or an upgrade to a device that reads slowly; then the connection is closed.
        pub answer_timeout_ms: u64 = 5_000, "milliseconds", 100..=60_000;
        /// Maximum time in which a device reads not a byte of what is sent to it; then the session ends. A device that
        /// reads slowly has ten times as long for all of it. A device whose machine does not answer at all is silent,
        /// and has as long as other silent devices.
        pub write_timeout_ms: u64 = 20_000, "milliseconds", 1_000..=300_000;
        /// Maximum frame from a device; then close 1009.
        pub frame_bytes_max: usize = 64 * 1024, "bytes", 256..=1_048_576;
        /// Maximum message from or to a device; then close 1009, or 413 from the API.
        pub message_bytes_max: usize = 64 * 1024, "bytes", 256..=1_048_576;
        /// Sustained rate of messages from one session. Heartbeats, pings and pongs are included. Above it: error
        /// `rate_limited`, then close 1008.
        pub messages_per_second: u32 = 100, "messages per second", 1..=10_000;
        /// Maximum number of messages that one session may send at once.
        pub messages_burst: u32 = 500, "messages", 1..=100_000;
        /// Maximum number of connections from one address (IPv6: one /64). Not given: once over half of
        /// `connections_max` is in use, each address gets a fair share.
        pub connections_per_address_max: Option<usize> = None, "connections", 1..=10_000_000;
        /// Maximum handshakes per second from one address (IPv6: one /64). Not given: once over half of
        /// `handshakes_max` is in use, each address gets a fair share.
        pub handshakes_per_second_per_address_max: Option<u32> = None, "handshakes per second", 1..=1_000_000;
    }
}

impl Limits {
    /// [`Self::head_timeout_ms`] as a span.
    #[must_use]
    pub const fn head_timeout(&self) -> Duration {
        Duration::from_millis(self.head_timeout_ms)
    }

    /// [`Self::answer_timeout_ms`] as a span.
    #[must_use]
    pub const fn answer_timeout(&self) -> Duration {
        Duration::from_millis(self.answer_timeout_ms)
    }

    /// [`Self::write_timeout_ms`] as a span.
    #[must_use]
    pub const fn write_timeout(&self) -> Duration {
        Duration::from_millis(self.write_timeout_ms)
    }
}

section! {
    /// What sessions are told at their start, and when they end.
    pub struct Session = "session" {
        /// Interval of the gateway's pings. No frame from the device for three times as long, at least 60 s: close
        /// 4001.
        pub heartbeat_ms: u64 = 30_000, "milliseconds", 1_000..=3_600_000;
        /// Longest wait of a device's own backoff, as the welcome frame tells it.
        pub backoff_cap_ms: u64 = 60_000, "milliseconds", 1_000..=3_600_000;
        /// Time for the acknowledgement of a message to a device; then the API answers 202 `sent`.
        pub ack_timeout_ms: u64 = 10_000, "milliseconds", 100..=60_000;
        /// Maximum age of a session, ±25 %; then close 1012 `ageing` with a slot. At most 0.1 % of the sessions end per
        /// minute, and none in a storm. So a fleet that connected together drifts apart. 0: no maximum.
        pub age_max_seconds: u64 = 86_400, "seconds", 0..=31_536_000;
    }
}

impl Session {
    /// [`Self::heartbeat_ms`] as a span.
    #[must_use]
    pub const fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms)
    }

    /// [`Self::age_max_seconds`] as a span; `None` if sessions have no maximum age.
    #[must_use]
    pub const fn age_max(&self) -> Option<Duration> {
        match self.age_max_seconds {
            0 => None,
            seconds => Some(Duration::from_secs(seconds)),
        }
    }

    /// [`Self::ack_timeout_ms`] as a span.
    #[must_use]
    pub const fn ack_timeout(&self) -> Duration {
        Duration::from_millis(self.ack_timeout_ms)
    }
}

section! {
    /// Presence of devices: what is kept of it in the database.
    pub struct PresenceSettings = "presence" {
        /// Time for which changes of presence are kept; older ones are deleted, at a pace. The newest state of each
        /// device is kept for as long as the device is registered.
        pub history_seconds: u64 = 604_800, "seconds", 3_600..=31_536_000;
    }
}

impl PresenceSettings {
    /// [`Self::history_seconds`] as a span.
    #[must_use]
    pub const fn history(&self) -> Duration {
        Duration::from_secs(self.history_seconds)
    }
}

section! {
    /// Firmware rules: how a node learns of changes.
    pub struct RulesSync = "rules" {
        /// Interval at which the revision of the rules is read from the database.
        pub poll_ms: u64 = 500, "milliseconds", 100..=10_000;
    }
}

impl RulesSync {
    /// [`Self::poll_ms`] as a span.
    #[must_use]
    pub const fn poll(&self) -> Duration {
        Duration::from_millis(self.poll_ms)
    }
}

section! {
    /// The cohort breaker: finds the firmware version whose devices fail, and proposes a rule for it.
    pub struct BreakerSettings = "breaker" {
        /// `off`: no proposals. `propose`: proposals, and a person decides. `apply`: where the evidence is strong, a
        /// rule admits 10 % of the cohort for 15 minutes, and is extended while they are bad. The cluster makes at most
        /// one such rule in 10 minutes, and a node none for more than 20 % of its own devices.
        pub mode: BreakerMode = BreakerMode::Propose;
        /// Admits few devices at a time with a firmware version that is new to the fleet. The limit ends on its own,
        /// after about 2 minutes, if their sessions are not worse than those of others.
        pub limit_unproven: bool = true;
    }
}

/// What the cohort breaker does on its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BreakerMode {
    /// No proposals.
    Off,
    /// Proposals, and a person decides.
    Propose,
    /// It writes rules where the evidence is strong.
    Apply,
}

impl From<BreakerMode> for Mode {
    fn from(mode: BreakerMode) -> Self {
        match mode {
            BreakerMode::Off => Self::Off,
            BreakerMode::Propose => Self::Propose,
            BreakerMode::Apply => Self::Apply,
        }
    }
}

section! {
    /// Resume tokens: how devices reconnect without a lookup.
    pub struct ResumeTokens = "resume" {
        /// Validity of a token; eight hours more while the database is unavailable. Devices get a new one after 50 % to
        /// 75 % of it. 0: tokens are neither issued nor accepted.
        pub life_seconds: u64 = 86_400, "seconds", 0..=LIFE_MAX.as_secs();
    }
}

impl ResumeTokens {
    /// [`Self::life_seconds`] as a span.
    #[must_use]
    pub const fn life(&self) -> Duration {
        Duration::from_secs(self.life_seconds)
    }
}

section! {
    /// Leaving: at SIGTERM, at Ctrl-C, and by `seawall drain start`.
    pub struct Drain = "drain" {
        /// Time between `/readyz` turning 503 and the first close; devices are admitted meanwhile. Set it to at least
        /// two health check intervals of the load balancer in front. It then sends no device here that would be
        /// refused. It is part of the deadline, and less than it. 0: none, for a node without a load balancer.
        pub announce_seconds: u64 = 0, "seconds", 0..=3_600;
        /// Time to close sessions one by one; then the rest get their 1012 at once. After a signal the process exits.
        pub deadline_seconds: u64 = 25, "seconds", 1..=86_400;
        /// Sessions closed per second. 0: as fast as the deadline requires, and as other nodes or this node's admission
        /// can admit them again.
        pub rate_per_second: u32 = 0, "sessions per second", 0..=1_000_000;
    }
}

impl Drain {
    /// [`Self::announce_seconds`] as a span.
    #[must_use]
    pub const fn announce(&self) -> Duration {
        Duration::from_secs(self.announce_seconds)
    }

    /// [`Self::deadline_seconds`] as a span.
    #[must_use]
    pub const fn deadline(&self) -> Duration {
        Duration::from_secs(self.deadline_seconds)
    }
}

section! {
    /// Receiver of alarms. Each beginning and end of an alarm is posted as JSON, signed as Standard Webhooks says. A
    /// message is sent again for an hour until it is answered 2xx or 410. At most 1,000 messages wait.
    pub struct WebhookSettings = "webhook" {
        /// Address of the receiver: `https://…`, or `http://…` on this machine. Not given: no messages.
        pub url: Option<String> = None;
        /// File with the secret that messages are signed with: `whsec_` and 24 to 64 bytes as base64. It is read again
        /// for each message. Needed with `url`.
        pub secret_file: Option<PathBuf> = None;
    }
}

impl WebhookSettings {
    /// The setting that contradicts another, and the problem.
    #[must_use]
    pub fn mismatch(&self) -> Option<(&'static str, &'static str)> {
        let Some(url) = &self.url else {
            let is_alone = self.secret_file.is_some();
            return is_alone.then_some((
                "webhook.url",
                "webhook.url and webhook.secret_file must be set together",
            ));
        };
        let uri: Option<ureq::http::Uri> = url.parse().ok();
        let parts = uri
            .as_ref()
            .and_then(|uri| Some((uri.scheme_str()?, uri.host().filter(|host| !host.is_empty())?)));
        match parts {
            Some(("https", _)) => {}
            Some(("http", host)) if is_loopback(host) => {}
            Some(("http", _)) => {
                return Some((
                    "webhook.url",
                    "alarms would cross the network in clear text: use https://, or a receiver on this machine",
                ));
            }
            Some(_) | None => return Some(("webhook.url", "expected https://HOST/PATH")),
        }
        let is_alone = self.secret_file.is_none();
        is_alone.then_some((
            "webhook.secret_file",
            "webhook.url and webhook.secret_file must be set together",
        ))
    }
}

fn is_loopback(host: &str) -> bool {
    let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

section! {
    /// Logs, on standard error.
    pub struct Logging = "logging" {
        /// `json`: one object per line, for machines. `human`: text for people. `auto`: `human` on a terminal, else
        /// `json`. Flag `--log-format`, environment `SEAWALL_LOG_FORMAT`.
        pub format: LogFormat = LogFormat::Auto;
        /// `error`, `warn`, `info`, `debug` or `trace` (a release build has nothing below `debug`), or directives such
        /// as `info,seawall_gateway::lookup=debug`. `seawall log-level` changes it until the configuration is read
        /// again. Flag `--log-level`, environment `SEAWALL_LOG_LEVEL`.
        pub level: String = "info".to_owned();
    }
}

/// Format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// `human` if standard error is a terminal, else `json`.
    Auto,
    /// One JSON object per line.
    Json,
    /// Text for people, in colour on a terminal.
    Human,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn source_is_one_or_two_urls_that_nobody_can_change_on_the_way() {
        let is_wrong = |urls: &[&str]| {
            let urls = urls.iter().map(|url| (*url).to_owned()).collect();
            SourceSettings { urls, refresh: 30 }.mismatch().is_some()
        };

        assert!(!is_wrong(&[]));
        assert!(!is_wrong(&[
            "https://a.example/seawall.toml?token=1",
            "http://127.0.0.1:9/x"
        ]));
        for urls in [
            &["https://a/x", "https://b/x", "https://c/x"][..],
            &["http://a.example/x"],
            &["https://a/x", "ftp://127.0.0.1/x"],
            &["https://u:p@a/x"],
            &["a.example"],
            &["https://"],
            &[""],
        ] {
            assert!(is_wrong(urls), "{urls:?}");
        }
    }

    #[test]
    fn webhook_needs_a_secret_and_https_outside_this_machine() {
        let wrong = |url: Option<&str>, secret_file: Option<&str>| {
            let settings = WebhookSettings {
                url: url.map(str::to_owned),
                secret_file: secret_file.map(PathBuf::from),
            };
            settings.mismatch().map(|(setting, _)| setting)
        };

        assert_eq!(wrong(None, None), None);
        for url in [
            "https://example.com/hook?key=1",
            "http://127.0.0.1:9/",
            "http://[::1]:9/x",
            "http://localhost/",
        ] {
            assert_eq!(wrong(Some(url), Some("s")), None, "{url}");
            assert_eq!(wrong(Some(url), None), Some("webhook.secret_file"));
        }
        for url in [
            "http://example.com/",
            "http://localhost.example.com/",
            "http://10.0.0.1/",
            "ftp://127.0.0.1/",
            "example.com",
            "https://",
            "",
        ] {
            assert_eq!(wrong(Some(url), Some("s")), Some("webhook.url"), "{url}");
        }
        assert_eq!(wrong(None, Some("s")), Some("webhook.url"));
    }
}
