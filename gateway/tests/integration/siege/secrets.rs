//! Secrets: places where they must not appear, and guesses, which must keep no device out.

use std::{
    fs,
    net::SocketAddr,
    time::{Duration, Instant},
};

use base64::{
    Engine,
    engine::general_purpose::{STANDARD, STANDARD_NO_PAD, URL_SAFE_NO_PAD},
};
use firmware_sim::connection::{Connection, Credential, DeviceConfig};
use seawall_proto::id::SecretHash;
use tokio::task::spawn_blocking;

use super::Siege;
use crate::{
    harness::{
        devices::{attempt, device, persist, with_wrong_secret},
        process::{GatewayProcess, run},
        wait::PATIENCE,
    },
    scarce::import,
};

/// Number of attempts with wrong secrets: more than the registry is queried for.
const GUESSES: usize = 30;
/// Maximum wait of a device whose secret is being guessed: its slot comes after 15 s at most.
const WAIT_MAX: Duration = Duration::from_secs(20);

fn secret_of(config: &DeviceConfig) -> String {
    match &config.credential {
        Credential::Bearer(secret) => secret.to_string(),
        Credential::Basic(_) | Credential::Missing => panic!("it shows no bearer"),
    }
}

/// All forms in which a log could reveal a secret.
fn shapes(secret: &str) -> Vec<String> {
    let hash = SecretHash::of(secret.as_bytes());
    let hash = hash.as_bytes();
    let hex: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
    vec![
        secret.to_owned(),
        STANDARD_NO_PAD.encode(secret),
        hex.clone(),
        hex.to_uppercase(),
        STANDARD.encode(hash),
        URL_SAFE_NO_PAD.encode(hash),
        format!("{:?}", &hash[..8]).trim_matches(['[', ']']).to_owned(),
    ]
}

async fn welcome_of(connection: &mut Connection) -> serde_json::Value {
    let welcome = connection.next_json(PATIENCE).await.unwrap();
    assert_eq!(welcome["type"], "welcome");
    welcome
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_in_log_metrics_or_api_whatever_is_logged() {
    let home = tempfile::tempdir().unwrap();
    let config = home.path().join("seawall.toml");
    fs::write(&config, "[logging]\nlevel = \"trace\"\n").unwrap();
    let gateway = spawn_blocking(move || GatewayProcess::start(&["--config", config.to_str().unwrap()]))
        .await
        .unwrap()
        .unwrap();
    import(&gateway, 0..3);
    let address = gateway.addresses.devices;
    let right = device(0);
    let wrong = with_wrong_secret(&device(1));
    let mut basic = device(2);
    let basic_secret = secret_of(&basic);
    basic.credential = Credential::Basic(basic_secret.clone().into());

    let mut session = attempt(address, right.clone()).await.admitted();
    let resume = welcome_of(&mut session).await["resume"].as_str().unwrap().to_owned();
    attempt(address, wrong.clone()).await.refused_with(401, "unauthorized");
    drop(attempt(address, basic).await.admitted());
    let mut back = right.clone();
    back.resume = Some(resume.clone());
    drop(attempt(address, back).await.admitted());
    let made = run(&mut gateway.operator(&["devices", "rotate", &right.id.to_string(), "--json"])).unwrap();
    assert!(made.status.success(), "{made:?}");
    let rotated: serde_json::Value = serde_json::from_slice(&made.stdout).unwrap();
    let rotated = rotated["secret"].as_str().unwrap().to_owned();

    let admin = fs::read_to_string(gateway.data_dir().join("admin.token")).unwrap();
    let keys: serde_json::Value =
        serde_json::from_slice(&fs::read(gateway.data_dir().join("keys.json")).unwrap()).unwrap();
    let mut shown = vec![gateway.metrics().unwrap()];
    for words in [
        &["devices", "list", "--json"][..],
        &["devices", "show", &right.id.to_string(), "--json"],
        &["audit", "--json"],
        &["nodes", "--json"],
        &["firmware", "--json"],
        &["tokens", "list", "--json"],
    ] {
        let output = run(&mut gateway.operator(words)).unwrap();
        assert!(output.status.success(), "{output:?}");
        shown.push(String::from_utf8(output.stdout).unwrap());
    }
    let log = gateway.log().unwrap();
    assert!(log.contains("connection attempt ended"), "it was logged at all");
    shown.push(log);

    let key = keys["slots"][0]["secret"].as_str().unwrap().to_owned();
    let mut secrets: Vec<String> = [&secret_of(&right), &secret_of(&wrong), &basic_secret, &rotated]
        .iter()
        .flat_map(|secret| shapes(secret))
        .collect();
    secrets.extend([resume, key]);
    secrets.extend(shapes(admin.trim()));
    for text in &shown {
        for secret in &secrets {
            assert!(
                !text.contains(secret.as_str()),
                "{secret} is in {}",
                line_with(text, secret)
            );
        }
    }
}

fn line_with<'a>(text: &'a str, secret: &str) -> &'a str {
    text.lines().find(|line| line.contains(secret)).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn guesses_at_its_secret_delay_a_device_by_one_slot_and_one_with_a_resume_token_not_at_all() {
    let siege = Siege::of_tcp("").await;
    let address = siege.address;
    let mut resuming = device(2);
    let mut session = attempt(address, resuming.clone()).await.admitted();
    resuming.resume = Some(welcome_of(&mut session).await["resume"].as_str().unwrap().to_owned());
    drop(session);
    guess(address, 1).await;
    guess(address, 2).await;

    attempt(address, with_wrong_secret(&device(1)))
        .await
        .refused_with(503, "throttled");
    drop(attempt(address, resuming).await.admitted());
    let begun = Instant::now();
    let back = persist(address, device(1)).await;

    assert_eq!(back.refusals, 1);
    assert!(begun.elapsed() < WAIT_MAX, "{:?}", begun.elapsed());
    drop(back);
    siege.leaves_nothing().await;
}

async fn guess(address: SocketAddr, number: u32) {
    for _ in 0..GUESSES {
        let refused = attempt(address, with_wrong_secret(&device(number))).await;
        assert!([401, 503].contains(&refused.refused().status));
    }
}
