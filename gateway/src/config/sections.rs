//! The sections of the configuration that are the gateway's own. Start with [`Limits`].
//!
//! `[identity]` and `[admission]` are policy and live in `seawall_proto`.

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use seawall_proto::{hello::Paths, resume::LIFE_MAX};
use serde::{Deserialize, Serialize};

use super::{section::section, url::DatabaseUrl};

section! {
    /// Where devices connect, and where the gateway keeps its files.
    pub struct Server = "server" {
        /// Address for devices: `IP:PORT`; `HOST:PORT`, of which the first address is taken, IPv4 before IPv6; or `:PORT`, which is every IPv4 address. Port 0 takes a free one, written to `addresses.json` in the data directory. Flag `--listen`, environment `SEAWALL_LISTEN`.
        #[serde(deserialize_with = "super::listen::deserialize")]
        pub listen: SocketAddr = SocketAddr::from((Ipv4Addr::LOCALHOST, 8080));
        /// Paths at which devices connect, 1 to 16. A segment `{device}` is one more source of the device id, behind headers and the Basic user name and before the query; it is percent-decoded. Repeated slashes count as one.
        pub paths: Paths = Paths::default();
        /// Several gateways of this user listen on the same address (SO_REUSEPORT), each with a data directory and an `ops.listen` of its own, and the kernel spreads devices over them. One that is full leaves the address until it has room again.
        pub share_port: bool = false;
        /// Directory for the database (SQLite), keys, the admin token and `addresses.json`; made where it is missing, used by one gateway at a time. Flag `--data-dir`, environment `SEAWALL_DATA_DIR`.
        pub data_dir: PathBuf = PathBuf::from("./seawall-data");
        /// Name of this node in the API, logs and events: 1 to 64 bytes of printable ASCII. Not given: the name of the host.
        pub node: Option<String> = None;
        /// Memory that the gateway may use, at least 64 MiB, sockets in the kernel included (about 5 KiB a device). 0: what the cgroup allows, else what the machine has. Near it (10 % are left, at least 24 MiB, at most 512 MiB) new devices are answered 503 `overloaded` with a slot until 5 % more are free; live sessions stay. `/readyz` (`memory_short`), an alarm and `seawall_memory_bytes` say so. A cgroup's own limit counts as well, whatever stands here. Flag `--max-memory`, environment `SEAWALL_MAX_MEMORY`; these also take `512M` or `2G` (powers of 1,024).
        pub max_memory_bytes: u64 = 0, "bytes", 0..=1 << 50;
    }
}

section! {
    /// TLS for devices, versions 1.2 and 1.3. Files are read again at SIGHUP, and on their own within ten seconds of a change; sessions stay, and files that can't be used change nothing but the log, `seawall_tls_reloads_total`, `/readyz` (`tls_files`) and an alarm.
    pub struct TlsSettings = "tls" {
        /// PEM file with the certificate and those between it and its root, in this order; ECDSA P-256 costs least. Not given: plain TCP. Flag `--tls-cert`, environment `SEAWALL_TLS_CERT`.
        pub certificate: Option<PathBuf> = None;
        /// PEM file with the key of the certificate. Flag `--tls-key`, environment `SEAWALL_TLS_KEY`.
        pub key: Option<PathBuf> = None;
        /// Time for a TLS handshake; then the connection is closed. The head of the request has a time of its own.
        pub handshake_timeout_ms: u64 = 5_000, "milliseconds", 100..=60_000;
        /// PEM file with the authorities of client certificates. A certificate that names a UUID (URI `urn:uuid:…` or ending in it, first label of a DNS name, common name) is id and credential of that device. Not given: none is asked for.
        pub client_ca: Option<PathBuf> = None;
        /// PEM file with revocation lists: one of every authority that issues client certificates, and of the authorities above those. A certificate that is on one, or whose authority has none, is no longer accepted from new connections; nor is one below an authority that is on a list. Whether an authority whose issuer has no list here was revoked is not looked at: `seawall doctor` names those. A list past its next update counts on; `/readyz` (`revocation_list_out_of_date`), an alarm and `seawall_tls_revocation_list_expires_seconds` say so.
        pub client_crl: Option<PathBuf> = None;
        /// Ends handshakes of clients without a certificate, balancers' probes too.
        pub client_certificate_required: bool = false;
    }
}

impl TlsSettings {
    /// [`Self::handshake_timeout_ms`] as a span.
    #[must_use]
    pub const fn handshake_timeout(&self) -> Duration {
        Duration::from_millis(self.handshake_timeout_ms)
    }

    /// What does not fit together, and the setting to name.
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
    /// Balancers in front of the device listener: how limits by address see devices and not the balancer.
    pub struct ProxySettings = "proxy" {
        /// Addresses and networks of balancers, such as `10.0.0.0/8`; an IPv4 one may be written as IPv6 (`::ffff:10.0.0.0/104`). What any other address says of where it comes from is not believed.
        pub trusted: Vec<String> = Vec::new();
        /// Every connection from a trusted address begins with a header of the PROXY protocol, version 1 or 2, before TLS; one without is closed.
        pub protocol: bool = false;
        /// `X-Forwarded-For` of requests from a trusted address names the device's: the last one in it that is not trusted.
        pub forwarded_for: bool = false;
    }
}

section! {
    /// The API, metrics and health checks.
    pub struct Ops = "ops" {
        /// Address of the API: `IP:PORT`, `HOST:PORT` or `:PORT`, as `server.listen`. Port 0 takes a free one. Flag `--ops-listen`, environment `SEAWALL_OPS_LISTEN`.
        #[serde(deserialize_with = "super::listen::deserialize")]
        pub listen: SocketAddr = SocketAddr::from((Ipv4Addr::LOCALHOST, 8081));
        /// PEM file with the certificate of the API and those between it and its root. Not given: plain HTTP.
        pub tls_certificate: Option<PathBuf> = None;
        /// PEM file with the key of that certificate.
        pub tls_key: Option<PathBuf> = None;
        /// Allows an address outside loopback without TLS, although tokens then cross the network in clear text. Flag `--insecure-ops`.
        pub insecure: bool = false;
        /// Time for one API request, imports and event streams apart; then 503.
        pub request_timeout_ms: u64 = 30_000, "milliseconds", 1_000..=600_000;
        /// Greatest body of a request, imports apart; then 413.
        pub body_bytes_max: usize = 256 * 1024, "bytes", 16_384..=16_777_216;
        /// API calls with a token carried out at a time, one a connection; one more gets 503. Idle connections make way for new ones.
        pub connections_max: usize = 256, "connections", 8..=10_000;
        /// Readers of the event stream at a time; one more gets 503.
        pub event_readers_max: usize = 32, "readers", 1..=1_000;
    }
}

section! {
    /// The registry of devices, rules, tokens and the audit log.
    pub struct Database = "database" {
        /// `postgres://USER:PASSWORD@HOST/NAME` or `sqlite:PATH`. Not given: `seawall.db` in the data directory, SQLite. Special characters of the password are percent-encoded. Parameters: `sslmode` (default `prefer`, which verifies nothing; use `verify-full`), `sslrootcert`, `sslcert`, `sslkey`, `connect_timeout` (seconds, 1 to 60, default 3), `host`, `hostaddr`, `port`, `user`, `password`, `dbname`, `options`; any other stops the start. Flag `--database`, environment `SEAWALL_DATABASE`.
        pub url: Option<DatabaseUrl> = None;
    }
}

section! {
    /// What one gateway, one connection and one message may take. Each bound says what happens when it is reached.
    pub struct Limits = "limits" {
        /// Connections of devices at a time. 0: as many as memory and the limit on open files allow. One more is answered 503 `overloaded`, with a slot.
        pub connections_max: usize = 0, "connections", 0..=10_000_000;
        /// Handshakes under way, from accept to a complete head; more wait in the listen backlog. While some wait, one that has shown no head for 10 ms steps aside and no longer counts here: those that have sent something up to eight for each of these, those that have sent nothing up to four for each free connection. Never more than half of the connections, nor than fit into the memory that a full node keeps free (288 KiB for each of these: 85 with 128 MiB). Devices waiting for a look-up have a bound of their own, in `[admission]`.
        pub handshakes_max: usize = 500, "connections", 8..=100_000;
        /// Greatest head of a device's request, and greatest target in it; then 431 and 414.
        pub head_bytes_max: usize = 8 * 1024, "bytes", 1_024..=65_536;
        /// Time for a complete head; then 408.
        pub head_timeout_ms: u64 = 5_000, "milliseconds", 100..=60_000;
        /// Time for a refusal or an upgrade to be written to a device that reads slowly; then the connection is closed.
        pub answer_timeout_ms: u64 = 5_000, "milliseconds", 100..=60_000;
        /// Time in which a device takes not a byte of what is sent to it; then the session ends. A device that reads slowly has ten times as long for all of it.
        pub write_timeout_ms: u64 = 20_000, "milliseconds", 1_000..=300_000;
        /// Greatest frame from a device; then close 1009.
        pub frame_bytes_max: usize = 64 * 1024, "bytes", 256..=1_048_576;
        /// Greatest message from or to a device; then close 1009, or 413 from the API.
        pub message_bytes_max: usize = 64 * 1024, "bytes", 256..=1_048_576;
        /// Messages a second that one session may send for long. Heartbeats, pings and pongs count too. Over it: error `rate_limited`, then close 1008.
        pub messages_per_second: u32 = 100, "messages a second", 1..=10_000;
        /// Messages that one session may send at once.
        pub messages_burst: u32 = 500, "messages", 1..=100_000;
        /// Connections from one address (IPv6: one /64). Not given: no fixed figure; over half of `connections_max` in use, each address gets a fair share.
        pub connections_per_address_max: Option<usize> = None, "connections", 1..=10_000_000;
        /// Handshakes a second from one address (IPv6: one /64). Not given: no fixed figure; over half of `handshakes_max` in use, each address gets a fair share.
        pub handshakes_per_second_per_address_max: Option<u32> = None, "handshakes a second", 1..=1_000_000;
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
    /// What sessions are told when they begin, and when they are given up.
    pub struct Session = "session" {
        /// The gateway pings each session this often. No frame from the device for three times as long, at least 60 s: close 4001.
        pub heartbeat_ms: u64 = 30_000, "milliseconds", 1_000..=3_600_000;
        /// Longest wait of a device's own backoff, as the welcome frame tells it.
        pub backoff_cap_ms: u64 = 60_000, "milliseconds", 1_000..=3_600_000;
        /// Time for the acknowledgement of a message to a device; then the API answers 202 `sent`.
        pub ack_timeout_ms: u64 = 10_000, "milliseconds", 100..=60_000;
        /// How long a session lives, a quarter more or less; then close 1012 `ageing` with a slot. So few at a time (0.1 % a minute), and none in a storm, that a fleet which has connected together drifts apart. 0: for ever.
        pub age_max_seconds: u64 = 86_400, "seconds", 0..=31_536_000;
    }
}

impl Session {
    /// [`Self::heartbeat_ms`] as a span.
    #[must_use]
    pub const fn heartbeat(&self) -> Duration {
        Duration::from_millis(self.heartbeat_ms)
    }

    /// [`Self::age_max_seconds`] as a span; `None` where sessions live for ever.
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
    /// Firmware rules: how a node learns of changes.
    pub struct RulesSync = "rules" {
        /// How often the revision of the rules is read from the database.
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
    /// Resume tokens: how devices come back without a look-up.
    pub struct ResumeTokens = "resume" {
        /// How long a token counts; eight hours more while the database is away. Devices get a new one after 50 to 75 % of it. 0: none is given, and none counts.
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
        /// Time between `/readyz` turning 503 and the first close; devices are let in meanwhile. At least two health intervals of the balancer in front, which then sends nobody here who would have to be sent away. Part of the deadline, and less than it. 0: none, as for a node without a balancer.
        pub announce_seconds: u64 = 0, "seconds", 0..=3_600;
        /// Time to close sessions one by one; those left then get their 1012 at once. After a signal the process exits.
        pub deadline_seconds: u64 = 25, "seconds", 1..=86_400;
        /// Sessions closed a second. 0: as fast as the deadline asks for, and other nodes or this node's admission can take them back.
        pub rate_per_second: u32 = 0, "sessions a second", 0..=1_000_000;
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
    /// Logs, on standard error.
    pub struct Logging = "logging" {
        /// `json`: one object a line, for machines. `human`: text for people. `auto`: `human` where standard error is a terminal, else `json`. Flag `--log-format`, environment `SEAWALL_LOG_FORMAT`.
        pub format: LogFormat = LogFormat::Auto;
        /// `error`, `warn`, `info`, `debug` or `trace` (a release build has nothing below `debug`), or directives such as `info,seawall_gateway::lookup=debug`. SIGHUP makes a running gateway read it again; `seawall log-level` changes it until then. Flag `--log-level`, environment `SEAWALL_LOG_LEVEL`. Flag `--log-level`, environment `SEAWALL_LOG_LEVEL`.
        pub level: String = "info".to_owned();
    }
}

/// How a log line is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// `human` where standard error is a terminal, else `json`.
    Auto,
    /// One JSON object a line.
    Json,
    /// Text for people, in colour on a terminal.
    Human,
}
