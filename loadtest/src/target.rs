//! A gateway or cluster that runs already: where it is, and whether it may be loaded.
//!
//! Start with [`Asked::resolve`]. Names are looked up once, and everything afterwards uses these addresses: a name that
//! changes its address during the run leads nowhere else. [`preflight`](crate::preflight) then asks the target itself.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::Arc,
};

use anyhow::{Context, Result, anyhow, bail};
use firmware_sim::{
    identity::Identity,
    target::{Target, TargetError},
    tls::Trust,
};
use ureq::{
    http::Uri,
    tls::{Certificate, RootCerts, TlsConfig},
};

use crate::{
    exit::Failure,
    metrics::Ops,
    scenario::{Action, Scenario},
};

/// Most devices, and registered devices, at a target that is not on loopback, unless `--max-devices` says otherwise.
pub const DEVICES_MAX: u32 = 1_000;
/// Most attempts per second at a target that is not on loopback, unless `--max-per-second` says otherwise.
pub const PER_SECOND_MAX: f64 = 1_000.0;

/// What the command line says about a target.
#[derive(Clone)]
pub struct Asked {
    /// `ws://…` or `wss://…`, with the path that devices ask for.
    pub target: String,
    /// `http://…` or `https://…`.
    pub ops: String,
    pub token: String,
    /// Devices that are registered there. `None`: the load test registers its own.
    pub identities: Option<Arc<[Identity]>>,
    /// Authorities that both addresses are verified by. `None`: those of this machine.
    pub ca: Option<PathBuf>,
    /// Whether a target outside loopback is allowed.
    pub is_confirmed: bool,
    pub devices_max: Option<u32>,
    pub per_second_max: Option<f64>,
}

/// A gateway or cluster that runs already, resolved and allowed.
#[derive(Clone)]
pub struct External {
    /// As it is shown: without a query, which may hold a secret.
    pub name: String,
    pub devices: Target,
    pub ops: Ops,
    /// Whether it runs on another machine.
    pub is_far: bool,
    pub identities: Option<Arc<[Identity]>>,
    /// Attempts per second, on average over some seconds, at which the run is stopped. `None`: not bounded.
    pub per_second_max: Option<f64>,
}

impl fmt::Debug for External {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("External")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl Asked {
    /// Looks up both addresses, and checks that this scenario may be run there.
    ///
    /// # Errors
    /// Wrong use: an address is malformed, is not on loopback without a confirmation, or the scenario is beyond the
    /// bounds. Not run: a name has no address.
    pub async fn resolve(self, scenario: &Scenario) -> Result<External, Failure> {
        let trust = Trust::in_file(self.ca.clone());
        let devices = Target::resolve_trusting(&self.target, &trust)
            .await
            .map_err(|error| match error {
                TargetError::BadUrl(problem) => Failure::wrong_use(anyhow!("--target: {problem}")),
                TargetError::NoTrust(_) => Failure::WrongUse(anyhow::Error::from(error).context("--ca")),
                TargetError::NoAddress { .. } => {
                    Failure::NotRun(anyhow::Error::from(error).context("--target: check the name, and your DNS"))
                }
            })?;
        let ops = ops_uri(&self.ops).map_err(Failure::WrongUse)?;
        let ops_addresses = addresses(&ops).await?;
        let is_loopback = |address: &SocketAddr| is_loopback(address.ip());
        let far = std::iter::once(("--target", devices.addr()))
            .chain(ops_addresses.iter().map(|address| ("--ops", *address)))
            .find(|(_, address)| !is_loopback(address));
        if let Some((option, address)) = far
            && !self.is_confirmed
        {
            return Err(Failure::wrong_use(anyhow!(
                "{option} is at {}, which is not a loopback address: a load test may harm whatever runs there. \
                 If you may load it, give --confirm-target",
                address.ip()
            )));
        }
        if let Some((_, address)) = far
            && ops.scheme_str() == Some("http")
            && ops_addresses.contains(&address)
        {
            eprintln!("warning: the token crosses the network in clear text: use https:// for --ops");
        }
        self.check_bounds(scenario, far.is_some()).map_err(Failure::WrongUse)?;
        let tls = if ops.scheme_str() == Some("https") {
            Some(tls_config(&trust).map_err(Failure::WrongUse)?)
        } else {
            None
        };
        Ok(External {
            name: shown(devices.uri()),
            ops: Ops::pinned(&self.ops, self.token, ops_addresses, tls),
            devices,
            is_far: far.is_some(),
            identities: self.identities,
            per_second_max: self.per_second_max.or_else(|| far.map(|_| PER_SECOND_MAX)),
        })
    }

    /// The scenario's devices and scheduled rates are within the bounds. [`harm`](crate::harm) bounds the rate during
    /// the run.
    fn check_bounds(&self, scenario: &Scenario, is_far: bool) -> Result<()> {
        let registered = if self.identities.is_none() {
            scenario.database.registered
        } else {
            0
        };
        let devices = scenario.devices.max(registered);
        let devices_max = self.devices_max.or_else(|| is_far.then_some(DEVICES_MAX));
        if let Some(most) = devices_max.filter(|most| devices > *most) {
            bail!(
                "the scenario has {devices} devices, and at most {most} are allowed at this target: \
                 give --devices {most}, or --max-devices {devices}"
            );
        }
        let Some(most) = self.per_second_max.or_else(|| is_far.then_some(PER_SECOND_MAX)) else {
            return Ok(());
        };
        for phase in &scenario.phases {
            let connects = match phase.action {
                Action::Connect { per_second } => per_second,
                Action::Hold
                | Action::DropAll
                | Action::Drop { .. }
                | Action::Grow { .. }
                | Action::Database(_)
                | Action::Gateway(_)
                | Action::Block { .. }
                | Action::Unblock => 0.0,
            };
            let rate = connects + phase.churn_per_second + phase.power_cuts_per_second + phase.closes_per_second;
            if rate > most {
                bail!(
                    "phase `{}` connects {rate} devices per second, and at most {most} are allowed at this target: \
                     change the scenario, or give --max-per-second {rate}",
                    phase.name
                );
            }
        }
        Ok(())
    }
}

/// Whether an address is of this machine alone.
fn is_loopback(address: IpAddr) -> bool {
    address.to_canonical().is_loopback()
}

/// The address without its query, which may hold a secret.
fn shown(uri: &impl fmt::Display) -> String {
    let text = uri.to_string();
    text.split('?').next().unwrap_or_default().to_owned()
}

/// Reads the ops address. It is not repeated in an error: it may hold a secret.
fn ops_uri(text: &str) -> Result<Uri> {
    let uri: Uri = text
        .trim_end_matches('/')
        .parse()
        .map_err(|_| anyhow!("--ops: expected http://HOST:PORT or https://HOST:PORT"))?;
    if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none_or(str::is_empty) {
        bail!("--ops: expected http://HOST:PORT or https://HOST:PORT");
    }
    if uri
        .authority()
        .is_some_and(|authority| authority.as_str().contains('@'))
        || uri.query().is_some()
    {
        bail!("--ops: expected no user, password or query: the token comes from --token-file or SEAWALL_TOKEN");
    }
    Ok(uri)
}

async fn addresses(ops: &Uri) -> Result<Vec<SocketAddr>, Failure> {
    let host = ops.host().unwrap_or_default().trim_matches(['[', ']']);
    let port = ops
        .port_u16()
        .unwrap_or(if ops.scheme_str() == Some("https") { 443 } else { 80 });
    let found: Vec<SocketAddr> = tokio::net::lookup_host((host, port))
        .await
        .with_context(|| format!("--ops: the host {host:?} has no address: check the name, and your DNS"))?
        .collect();
    if found.is_empty() {
        return Err(Failure::NotRun(anyhow!("--ops: the host {host:?} has no address")));
    }
    Ok(found)
}

fn tls_config(trust: &Trust) -> Result<TlsConfig> {
    let authorities = trust.authorities().context("--ca")?;
    let authorities = authorities
        .iter()
        .map(|der| Certificate::from_der(der).to_owned())
        .collect();
    Ok(TlsConfig::builder()
        .root_certs(RootCerts::Specific(Arc::new(authorities)))
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .build())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(target: &str, ops: &str) -> Asked {
        Asked {
            target: target.to_owned(),
            ops: ops.to_owned(),
            token: "hidden-token".to_owned(),
            identities: None,
            ca: None,
            is_confirmed: false,
            devices_max: None,
            per_second_max: None,
        }
    }

    fn scenario(devices: u32, per_second: f64) -> Scenario {
        toml::from_str(&format!(
            r#"
            name = "s"
            about = ""
            devices = {devices}
            capacity_per_second = 1000
            thresholds = ["missing == 0"]
            [[fleet]]
            name = "all"
            firmware = {{ "1.0.0" = 1.0 }}
            [[phase]]
            name = "connect"
            seconds = 1
            action = {{ connect = {{ per_second = {per_second} }} }}
            "#
        ))
        .unwrap()
    }

    async fn failure(asked: Asked, scenario: &Scenario) -> String {
        match asked.resolve(scenario).await.unwrap_err() {
            Failure::WrongUse(error) => format!("2 {error:#}"),
            Failure::NotRun(error) => format!("3 {error:#}"),
            Failure::Inconclusive(error) => format!("4 {error:#}"),
        }
    }

    #[tokio::test]
    async fn target_outside_loopback_needs_a_confirmation_wherever_it_is_named() {
        let (near, near_ops) = ("ws://127.0.0.1:1", "http://localhost:2");
        let small = scenario(10, 1.0);

        let allowed = asked("ws://localhost:1/x?key=hidden", near_ops)
            .resolve(&small)
            .await
            .unwrap();
        assert_eq!(
            (allowed.name.as_str(), allowed.per_second_max),
            ("ws://localhost:1/x", None)
        );
        assert!(!format!("{allowed:?} {:?}", allowed.ops).contains("hidden"));
        for (target, ops, option) in [
            ("ws://192.0.2.1:1", near_ops, "--target"),
            ("ws://0.0.0.0:1", near_ops, "--target"),
            ("ws://[2001:db8::1]:1", near_ops, "--target"),
            (near, "http://192.0.2.1", "--ops"),
        ] {
            let why = failure(asked(target, ops), &small).await;
            assert!(
                why.starts_with("2 ") && why.contains(option) && why.contains("--confirm-target"),
                "{why}"
            );
            let mut confirmed = asked(target, ops);
            confirmed.is_confirmed = true;
            let allowed = confirmed.resolve(&small).await.unwrap();
            assert_eq!(allowed.per_second_max, Some(PER_SECOND_MAX));
        }
        assert!(is_loopback("::ffff:127.0.0.1".parse().unwrap()) && !is_loopback("::ffff:192.0.2.1".parse().unwrap()));
    }

    #[tokio::test]
    async fn fleets_beyond_the_bounds_are_refused() {
        let near = || asked("ws://127.0.0.1:1", "http://127.0.0.1:2");
        let far = || Asked {
            is_confirmed: true,
            ..asked("ws://192.0.2.1:1", "http://127.0.0.1:2")
        };

        assert!(near().resolve(&scenario(5_000, 5_000.0)).await.is_ok());
        let why = failure(far(), &scenario(1_001, 1.0)).await;
        assert!(why.starts_with("2 ") && why.contains("--max-devices 1001"), "{why}");
        let why = failure(far(), &scenario(10, 1_001.0)).await;
        assert!(
            why.contains("phase `connect`") && why.contains("--max-per-second 1001"),
            "{why}"
        );
        let bounded = Asked {
            devices_max: Some(5_000),
            per_second_max: Some(5_000.0),
            ..far()
        };
        assert!(bounded.clone().resolve(&scenario(5_000, 5_000.0)).await.is_ok());
        let mut crowded = scenario(10, 1.0);
        crowded.database.registered = 200_000;
        assert!(
            failure(bounded, &crowded).await.contains("200000"),
            "registered devices stay there"
        );
    }

    #[tokio::test]
    async fn malformed_addresses_are_named_without_their_secrets() {
        let (near, near_ops) = ("ws://127.0.0.1:1", "http://127.0.0.1:2");
        for (target, ops, words) in [
            ("http://127.0.0.1:1", near_ops, "--target: expected ws://"),
            ("ws://id:hidden@127.0.0.1:1", near_ops, "--target: "),
            (near, "ws://127.0.0.1:2", "--ops: expected http://"),
            (near, "127.0.0.1:2", "--ops: expected http://"),
            (near, "http://admin:hidden@127.0.0.1:2", "--ops: expected no user"),
            (near, "http://127.0.0.1:2/?token=hidden", "--ops: expected no user"),
        ] {
            let why = failure(asked(target, ops), &scenario(1, 1.0)).await;

            assert!(
                why.starts_with("2 ") && why.contains(words) && !why.contains("hidden"),
                "{why}"
            );
        }
        let why = failure(asked("ws://does-not-exist.invalid:1", near_ops), &scenario(1, 1.0)).await;
        assert!(why.starts_with("3 ") && why.contains("does-not-exist.invalid"), "{why}");
    }
}
