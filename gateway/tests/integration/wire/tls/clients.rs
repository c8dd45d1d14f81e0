//! Client certificates as identity: the devices that they name, and that the registry still decides.

use rcgen::SanType;
use seawall_gateway::tasks::tls::reload_now;
use tokio::io::AsyncWriteExt;

use crate::harness::{
    authority::{Authority, Identity},
    gateway::Gateway,
    raw::{Response, request, response},
    wait::soon,
};

/// Whether a session began, or the code of the refusal; `None` if the TLS handshake failed.
async fn ask_as(
    authority: &Authority,
    gateway: &Gateway,
    identity: Option<&Identity>,
    lines: &[&str],
) -> Option<Response> {
    let mut stream = authority.connect(gateway.devices, identity).await.ok()?;
    stream.write_all(request(lines).as_bytes()).await.ok()?;
    // With TLS 1.3 a client learns that its certificate was refused when it reads.
    let mut first = [0];
    tokio::io::AsyncReadExt::read_exact(&mut stream, &mut first)
        .await
        .ok()?;
    let rest = tokio::io::AsyncReadExt::chain(&first[..], stream);
    Some(response(&mut Box::pin(rest)).await)
}

fn uri(text: String) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

fn dns(text: String) -> SanType {
    SanType::DnsName(text.try_into().unwrap())
}

#[tokio::test]
async fn certificate_is_id_and_credential_whichever_name_has_the_uuid() {
    let mut authority = Authority::new();
    let gateway = Gateway::start(&authority.settings_with_clients()).await;
    let (id, _) = gateway.device().await;
    for identity in [
        authority.client("camera", vec![uri(format!("urn:uuid:{id}"))]),
        authority.client("camera", vec![uri(format!("spiffe://fleet.example/device/{id}"))]),
        authority.client("camera", vec![dns(format!("{id}.devices.example"))]),
        authority.client(&id, Vec::new()),
    ] {
        assert_eq!(
            ask_as(&authority, &gateway, Some(&identity), &[]).await.unwrap().status,
            101
        );
        let same = format!("Seawall-Device: {id}");
        assert_eq!(
            ask_as(&authority, &gateway, Some(&identity), &[&same])
                .await
                .unwrap()
                .status,
            101
        );
    }
}

#[tokio::test]
async fn other_id_beside_a_certificate_and_two_ids_in_one_are_bad_requests() {
    let mut authority = Authority::new();
    let gateway = Gateway::start(&authority.settings_with_clients()).await;
    let (id, _) = gateway.device().await;
    let (other, secret) = gateway.device().await;
    let (other_line, bearer) = (
        format!("Seawall-Device: {other}"),
        format!("Authorization: Bearer {secret}"),
    );
    let one = authority.client(&id, Vec::new());
    let two = authority.client("camera", vec![dns(id), dns(other)]);

    let of_other = ask_as(&authority, &gateway, Some(&one), &[&other_line, &bearer])
        .await
        .unwrap();
    let of_two = ask_as(&authority, &gateway, Some(&two), &[]).await.unwrap();

    assert_eq!((of_other.status, of_two.status), (400, 400));
}

#[tokio::test]
async fn registry_decides_about_devices_with_certificates() {
    let mut authority = Authority::new();
    let gateway = Gateway::start(&authority.settings_with_clients()).await;
    let unknown = authority.client("9b0c2e4a-11d2-7f00-8000-0000000000aa", Vec::new());

    assert_eq!(
        ask_as(&authority, &gateway, Some(&unknown), &[]).await.unwrap().status,
        401
    );
}

#[tokio::test]
async fn certificate_is_optional_unless_it_is_required() {
    let mut authority = Authority::new();
    let settings = authority.settings_with_clients();
    let optional = Gateway::start(&settings).await;
    let required = Gateway::start(&format!("{settings}client_certificate_required = true\n")).await;
    let lines = [optional.device_lines().await, required.device_lines().await];
    let nameless = authority.client("a fleet", Vec::new());

    assert_eq!(
        ask_as(&authority, &optional, None, &[&lines[0]]).await.unwrap().status,
        101
    );
    assert!(ask_as(&authority, &required, None, &[&lines[1]]).await.is_none());
    // With a certificate that names no device, its holder sends id and secret.
    assert_eq!(
        ask_as(&authority, &required, Some(&nameless), &[&lines[1]])
            .await
            .unwrap()
            .status,
        101
    );
    assert_eq!(
        ask_as(&authority, &required, Some(&nameless), &[])
            .await
            .unwrap()
            .status,
        400
    );
    let other = Authority::new().client("x", Vec::new());
    assert!(
        ask_as(&authority, &optional, Some(&other), &[&lines[0]])
            .await
            .is_none()
    );
}

#[tokio::test]
async fn revoked_certificate_is_refused_from_the_next_list_on() {
    let mut authority = Authority::new();
    let settings = authority.settings_with_clients();
    let list = authority.write("revoked.pem", &authority.revocations(&[]));
    let gateway = Gateway::start(&format!("{settings}client_crl = {list:?}\n")).await;
    let (id, _) = gateway.device().await;
    let (kept, revoked) = (authority.client(&id, Vec::new()), authority.client(&id, Vec::new()));
    assert_eq!(
        ask_as(&authority, &gateway, Some(&revoked), &[]).await.unwrap().status,
        101
    );
    authority.write("revoked.pem", &authority.revocations(&[&revoked.serial]));

    reload_now(&gateway.shared).await;

    assert!(ask_as(&authority, &gateway, Some(&revoked), &[]).await.is_none());
    assert_eq!(
        ask_as(&authority, &gateway, Some(&kept), &[]).await.unwrap().status,
        101
    );
}

#[tokio::test]
async fn session_of_a_revoked_certificate_is_closed_with_the_next_list() {
    let mut authority = Authority::new();
    let settings = authority.settings_with_clients();
    let list = authority.write("revoked.pem", &authority.revocations(&[]));
    let gateway = Gateway::start(&format!("{settings}client_crl = {list:?}\n")).await;
    let [kept, revoked] = [gateway.device().await.0, gateway.device().await.0];
    let mut sessions = Vec::new();
    let identities = [&kept, &revoked].map(|id| authority.client(id, Vec::new()));
    for identity in &identities {
        let mut stream = authority.connect(gateway.devices, Some(identity)).await.unwrap();
        stream.write_all(request(&[]).as_bytes()).await.unwrap();
        let mut first = [0];
        tokio::io::AsyncReadExt::read_exact(&mut stream, &mut first)
            .await
            .unwrap();
        sessions.push(stream);
    }
    soon(|| gateway.shared.sessions.len() == 2).await;
    let is_closing = |id: &str| {
        let session = gateway.shared.sessions.get(id.parse().unwrap());
        session.is_none_or(|session| session.is_closing())
    };
    authority.write("revoked.pem", &authority.revocations(&[&identities[1].serial]));

    reload_now(&gateway.shared).await;

    assert!(is_closing(&revoked) && !is_closing(&kept));
}

#[tokio::test]
async fn authority_on_the_list_of_the_one_above_it_is_refused_with_all_that_it_issued() {
    let mut root = Authority::new();
    let settings = root.settings_with_clients();
    let (mut factory, number) = root.below("factory");
    let list = root.write(
        "revoked.pem",
        &format!("{}{}", factory.revocations(&[]), root.revocations(&[])),
    );
    let gateway = Gateway::start(&format!("{settings}client_crl = {list:?}\n")).await;
    let (id, _) = gateway.device().await;
    let device = factory.client(&id, Vec::new());
    let status = || async {
        let answer = ask_as(&root, &gateway, Some(&device), &[]).await;
        answer.map(|answer| answer.status)
    };
    assert_eq!(status().await, Some(101));

    // Without a list of the root the factory's state is unknown, and only its devices are checked.
    root.write("revoked.pem", &factory.revocations(&[]));
    reload_now(&gateway.shared).await;
    assert_eq!(status().await, Some(101));
    root.write("revoked.pem", &factory.revocations(&[&device.serial]));
    reload_now(&gateway.shared).await;
    assert_eq!(status().await, None);

    // If the device's own CA has no list, the state of the device is unknown.
    root.write("revoked.pem", &root.revocations(&[]));
    reload_now(&gateway.shared).await;
    assert_eq!(status().await, None);

    for lists in [
        format!("{}{}", factory.revocations(&[]), root.revocations(&[&number])),
        format!("{}{}", root.revocations(&[&number]), factory.revocations(&[])),
    ] {
        root.write("revoked.pem", &lists);
        reload_now(&gateway.shared).await;
        assert_eq!(status().await, None);
    }
}

#[tokio::test]
async fn list_of_a_far_authority_counts_although_one_between_has_none() {
    let mut root = Authority::new();
    let settings = root.settings_with_clients();
    let (mut country, number) = root.below("country");
    let (mut factory, _) = country.below("factory");
    let lists = |revoked: &[&rcgen::SerialNumber]| format!("{}{}", factory.revocations(&[]), root.revocations(revoked));
    let list = root.write("revoked.pem", &lists(&[]));
    let revoked = lists(&[&number]);
    let gateway = Gateway::start(&format!("{settings}client_crl = {list:?}\n")).await;
    let (id, _) = gateway.device().await;
    let device = factory.client(&id, Vec::new());
    assert_eq!(ask_as(&root, &gateway, Some(&device), &[]).await.unwrap().status, 101);

    root.write("revoked.pem", &revoked);
    reload_now(&gateway.shared).await;

    assert!(ask_as(&root, &gateway, Some(&device), &[]).await.is_none());
}

#[tokio::test]
async fn list_that_is_out_of_date_counts_on_and_is_told_until_it_is_replaced() {
    const REASON: &str = "revocation_list_out_of_date";
    let mut authority = Authority::new();
    let settings = authority.settings_with_clients();
    let list = authority.write("revoked.pem", &authority.revocations(&[]));
    let gateway = Gateway::start(&format!("{settings}client_crl = {list:?}\n")).await;
    let (id, _) = gateway.device().await;
    let (kept, revoked) = (authority.client(&id, Vec::new()), authority.client(&id, Vec::new()));
    let alarms = || {
        let text = format!("{:?}", gateway.shared.events.after(0, 1_000, usize::MAX));
        text.matches(REASON).count()
    };
    reload_now(&gateway.shared).await;
    assert!(!gateway.shared.readiness().reasons.contains(&REASON));
    assert!(gateway.figure("seawall_tls_revocation_list_expires_seconds") > 0.0);

    authority.write("revoked.pem", &authority.revocations_until(&[&revoked.serial], 2026));
    reload_now(&gateway.shared).await;
    reload_now(&gateway.shared).await;

    let readiness = gateway.shared.readiness();
    assert!(readiness.ready && readiness.reasons.contains(&REASON), "{readiness:?}");
    assert!(gateway.figure("seawall_tls_revocation_list_expires_seconds") < 0.0);
    assert_eq!(alarms(), 1);
    assert!(ask_as(&authority, &gateway, Some(&revoked), &[]).await.is_none());
    assert_eq!(
        ask_as(&authority, &gateway, Some(&kept), &[]).await.unwrap().status,
        101
    );

    authority.write("revoked.pem", &authority.revocations(&[&revoked.serial]));
    reload_now(&gateway.shared).await;

    assert!(!gateway.shared.readiness().reasons.contains(&REASON));
    assert_eq!(alarms(), 2);
}

#[tokio::test]
async fn wrong_secrets_with_its_id_do_not_keep_a_device_with_a_certificate_out() {
    let mut authority = Authority::new();
    let gateway = Gateway::start(&authority.settings_with_clients()).await;
    let (id, secret) = gateway.device().await;
    let device = authority.client(&id, Vec::new());
    let shown = |secret: &str| format!("Seawall-Device: {id}\r\nAuthorization: Bearer {secret}");
    let (wrong, right) = (shown("wrong-secret-of-nobody"), shown(&secret));
    let ask_with = |lines: String| {
        let (authority, gateway) = (&authority, &gateway);
        async move { ask_as(authority, gateway, None, &[&lines]).await.unwrap() }
    };
    for _ in 0..10 {
        assert_eq!(ask_with(wrong.clone()).await.status, 401);
    }
    assert_eq!(ask_with(wrong).await.code(), "throttled");
    assert_eq!(ask_with(right).await.code(), "throttled");

    let answer = ask_as(&authority, &gateway, Some(&device), &[]).await.unwrap();

    assert_eq!(answer.status, 101);
}
