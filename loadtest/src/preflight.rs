//! What a target is asked before anything is done to it: each mistake is named here, with what to do about it.

use std::io;

use anyhow::{Context, Result, anyhow, bail};
use firmware_sim::{
    connection::{Connection, Credential, DeviceConfig, OpenError, Refused},
    identity::Identity,
};
use seawall_proto::id::DeviceId;
use serde::Deserialize;

use crate::target::External;

/// Close code of a probe that was admitted.
const CLOSE_NORMAL: u16 = 1000;

/// Body of `/readyz`.
#[derive(Deserialize)]
struct Ready {
    ready: bool,
    #[serde(default)]
    reasons: Vec<serde_json::Value>,
}

/// What of a problem document is read.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Problem {
    code: String,
    detail: String,
}

/// Asks the target's API and its device address.
///
/// # Errors
/// The first thing that is wrong, and what to do.
pub async fn check(external: &External) -> Result<()> {
    let ops = external.ops.clone();
    tokio::task::spawn_blocking(move || check_ops(&ops))
        .await
        .context("the task that asks")??;
    check_devices(external).await
}

fn check_ops(ops: &crate::metrics::Ops) -> Result<()> {
    let at = format!("--ops {}", ops.url());
    let (status, body) = ops
        .answer("/readyz", false)
        .map_err(|error| anyhow!("{at}: {}", unanswered(&error)))?;
    let problem: Problem = serde_json::from_str(&body).unwrap_or_default();
    if problem.detail.contains("this port uses TLS") {
        bail!("{at}: it uses TLS: use https://");
    }
    let Ok(ready) = serde_json::from_str::<Ready>(&body) else {
        // The address for devices answers balancers by status alone.
        let other = ops
            .answer("/api/v1/node", false)
            .map(|(_, body)| body)
            .unwrap_or_default();
        let other: Problem = serde_json::from_str(&other).unwrap_or_default();
        if other.detail.contains("no device connects at this path") {
            bail!("{at} is the address for devices: --ops is the one of the API, usually port 8081");
        }
        bail!(
            "{at} is not the API of a Seawall: it answered /readyz with {status}. Check the address; \
             other gateways can't be driven"
        );
    };
    if !ready.ready {
        let reasons: Vec<String> = ready.reasons.iter().map(ToString::to_string).collect();
        bail!(
            "{at}: the gateway is not ready ({}): `seawall doctor` tells more",
            reasons.join(", ")
        );
    }
    let (status, body) = ops
        .answer("/api/v1/node", true)
        .map_err(|error| anyhow!("{at}: {}", unanswered(&error)))?;
    match status {
        200 => Ok(()),
        401 => bail!(
            "{at}: it does not accept the token (401): give this gateway's own with --token-file or SEAWALL_TOKEN. \
             `seawall tokens create` makes one"
        ),
        _ => {
            let problem: Problem = serde_json::from_str(&body).unwrap_or_default();
            bail!("{at}: /api/v1/node answered {status}: {}", problem.detail)
        }
    }
}

/// Why a request to the API had no answer.
fn unanswered(error: &ureq::Error) -> String {
    let text = chain(error);
    if text.contains("InvalidContentType") || text.contains("corrupt message") {
        return "it does not use TLS: use http://".to_owned();
    }
    if let Some(why) = untrusted(&text) {
        return why;
    }
    if let ureq::Error::Io(error) = error {
        let kind = error.kind();
        if kind == io::ErrorKind::ConnectionRefused {
            return "nothing listens there: start the gateway, or correct the address".to_owned();
        }
        let is_closed = matches!(kind, io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof);
        if is_closed || text.contains("disconnected") {
            return "it closed the connection without an answer: it is not the API of a Seawall".to_owned();
        }
    }
    if matches!(error, ureq::Error::Timeout(_)) {
        return "no answer in time: is a firewall between, or the gateway frozen?".to_owned();
    }
    if matches!(error, ureq::Error::Protocol(_)) {
        return "it does not speak HTTP: correct the address".to_owned();
    }
    text
}

/// Fault of a certificate, if the error is about one.
fn untrusted(text: &str) -> Option<String> {
    if text.contains("UnknownIssuer") {
        return Some(
            "its certificate is from an authority that is unknown here: give the authority's file with --ca".to_owned(),
        );
    }
    if text.contains("NotValidForName") || text.contains("not valid for name") {
        return Some("its certificate is for another name: use the name that the certificate has".to_owned());
    }
    if text.contains("Expired") || text.contains("certificate expired") {
        return Some("its certificate has expired".to_owned());
    }
    None
}

/// An error with its causes, each once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        source = cause.source();
    }
    text
}

async fn check_devices(external: &External) -> Result<()> {
    let at = format!("--target {}", external.name);
    // Without a credential a Seawall answers 401 and asks no database: nothing is left behind.
    let mut probe = DeviceConfig::new(DeviceId::from_uuid(uuid::Uuid::new_v4()), "");
    probe.credential = Credential::Missing;
    match Connection::open_at(&external.devices, &probe).await {
        Ok(connection) => {
            goodbye(connection).await;
            bail!(
                "{at} is not a Seawall: it accepts a device without a credential. Check the address and the path; \
                 other gateways can't be driven"
            );
        }
        Err(OpenError::Refused(refused)) => check_refusal(&at, &refused)?,
        Err(error) => return Err(unopened(&at, &error)),
    }
    match external.identities.as_deref().and_then(<[Identity]>::first) {
        Some(first) => check_first(external, &at, first, probe).await,
        None => Ok(()),
    }
}

/// The first device of the file shows whether the target knows them.
async fn check_first(external: &External, at: &str, first: &Identity, probe: DeviceConfig) -> Result<()> {
    let device = DeviceConfig {
        id: first.id,
        external_id: first.external_id.as_deref().map(str::to_owned),
        credential: Credential::Bearer(first.secret.clone()),
        tenant: first.tenant.as_deref().map(str::to_owned),
        model: first.model.as_deref().map(str::to_owned),
        ..probe
    };
    match Connection::open_at(&external.devices, &device).await {
        Ok(connection) => {
            goodbye(connection).await;
            Ok(())
        }
        Err(OpenError::Refused(refused)) if refused.status == 401 => bail!(
            "{at} does not know the first device of --devices-file, or not by this secret (401): use a file of this \
             gateway, as `seawall devices seed --out` writes it"
        ),
        Err(OpenError::Refused(refused)) => check_refusal(at, &refused),
        Err(error) => Err(unopened(at, &error)),
    }
}

async fn goodbye(mut connection: Connection) {
    // A peer that has gone needs none.
    let _ = connection.close(CLOSE_NORMAL, "").await;
}

/// A refusal of a device is expected. It also shows who answers.
fn check_refusal(at: &str, refused: &Refused) -> Result<()> {
    let detail = refused.detail.as_deref().unwrap_or_default();
    if detail.contains("this port uses TLS") {
        bail!("{at}: it uses TLS: use wss://");
    }
    match (refused.status, refused.known_code().is_some()) {
        (404, _) => bail!(
            "{at}: no device connects at this path (404). It is /v1/connect unless `server.paths` says otherwise. Is it \
             the address of the API, or of another server? Its answer: {detail:?}"
        ),
        (400 | 426, true) => bail!("{at}: it refuses every device ({}): {detail}", refused.status),
        (_, true) => Ok(()),
        (status, false) => bail!(
            "{at} is not a Seawall: it answered {status} without a code that devices know. Check the address, and the \
             proxy in front of it; other gateways can't be driven"
        ),
    }
}

fn unopened(at: &str, error: &OpenError) -> anyhow::Error {
    let text = chain(error);
    let why = match error {
        OpenError::Unreachable(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            "nothing listens there: start the gateway, or correct the address".to_owned()
        }
        OpenError::TimedOut(time) => {
            format!(
                "no answer in {} s: is a firewall between, or the gateway frozen?",
                time.as_secs()
            )
        }
        OpenError::NoAnswer(_) if text.contains("InvalidContentType") || text.contains("corrupt message") => {
            "it does not use TLS: use ws://".to_owned()
        }
        OpenError::NoAnswer(_) => untrusted(&text).unwrap_or_else(|| {
            format!(
                "it closed the connection without an answer: is it a WebSocket server, and does it use TLS? ({text})"
            )
        }),
        OpenError::BadAnswer(what) => format!("it does not speak WebSocket ({what}): correct the address"),
        OpenError::Refused(_) | OpenError::Unreachable(_) | OpenError::BadHello | OpenError::Target(_) => text,
    };
    anyhow!("{at}: {why}")
}
