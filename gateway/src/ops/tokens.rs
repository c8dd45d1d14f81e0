//! `/tokens`: access tokens for the API.

use std::sync::Arc;

use axum::{
    Json,
    extract::State,
    http::{HeaderName, StatusCode, header},
};
use seawall_proto::{id::SecretHash, time::WallTime};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::{router::OpenApiRouter, routes};
use uuid::Uuid;

use super::{
    Api,
    auth::{Admin, Caller, Viewer},
    extract::{Body, Id, Page, PageParams, Params, label},
    problem::{Problem, ProblemBody},
};
use crate::{
    store::{NewToken, Role, TokenRow, UNKNOWN_ROLE},
    tokens::{ADMIN_TOKEN_NAME, random_secret},
};

/// Name in the audit log of the gateway's own actions.
const GATEWAY: &str = "gateway";

pub fn routes() -> OpenApiRouter<Arc<Api>> {
    OpenApiRouter::new()
        .routes(routes!(list_tokens, create_token))
        .routes(routes!(revoke_token))
}

/// A token, without its secret.
#[derive(Debug, Serialize, ToSchema)]
pub struct TokenView {
    id: Uuid,
    name: String,
    /// `viewer`, `operator` or `admin`.
    role: &'static str,
    /// RFC 3339.
    created_at: String,
    /// RFC 3339; null while it is valid.
    revoked_at: Option<String>,
}

impl From<&TokenRow> for TokenView {
    fn from(row: &TokenRow) -> Self {
        Self {
            id: row.id,
            name: row.name.clone(),
            role: row.role.map_or(UNKNOWN_ROLE, Role::as_str),
            created_at: row.created_at.to_rfc3339(),
            revoked_at: row.revoked_at.map(WallTime::to_rfc3339),
        }
    }
}

/// A token to create.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NewTokenBody {
    /// Owner or purpose: 1 to 64 bytes of printable ASCII, and not the name of another valid token. The audit log names
    /// it.
    name: String,
    #[schema(value_type = String, pattern = "^(viewer|operator|admin)$")]
    role: Role,
}

/// A new token.
#[derive(Serialize, ToSchema)]
pub struct CreatedToken {
    #[serde(flatten)]
    view: TokenView,
    /// Shown this once.
    token: String,
}

/// Tokens, including revoked ones, without the admin token of the data directory
#[utoipa::path(
    get, path = "/api/v1/tokens", tag = "tokens", params(PageParams),
    responses(
        (status = 200, description = "A page", body = Page<TokenView>),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn list_tokens(
    _caller: Caller<Viewer>,
    State(api): State<Arc<Api>>,
    Params(params): Params<PageParams>,
) -> Result<Json<Page<TokenView>>, Problem> {
    let rows = api.state.store.tokens().await?;
    let mut tokens: Vec<TokenView> = rows.iter().map(TokenView::from).collect();
    tokens.sort_unstable_by_key(|token| token.id);
    Page::of_sorted(tokens, &params, |token| token.id).map(Json)
}

/// Create a token; it is in this answer only
#[utoipa::path(
    post, path = "/api/v1/tokens", tag = "tokens", request_body = NewTokenBody,
    responses(
        (status = 201, description = "Valid on this node now, on others within 5 s", body = CreatedToken),
        (status = 409, description = "A valid token has this name, or there are too many", body = ProblemBody, content_type = "application/problem+json"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn create_token(
    caller: Caller<Admin>,
    State(api): State<Arc<Api>>,
    Body(body): Body<NewTokenBody>,
) -> Result<(StatusCode, [(HeaderName, String); 1], Json<CreatedToken>), Problem> {
    let name = name(&body.name)?;
    let token = random_secret();
    let new = NewToken {
        id: Uuid::now_v7(),
        name,
        role: body.role,
        sha256: SecretHash::of(token.as_bytes()),
    };
    let audit = caller.audit(&api, "token.create");
    let gateway = Arc::clone(&api.state);
    let row = api
        .carry_out(async move {
            let row = gateway.store.token_insert(&new, &audit).await?;
            gateway.tokens.insert(&row).await;
            Ok::<_, Problem>(row)
        })
        .await??;
    Ok((
        StatusCode::CREATED,
        [(header::LOCATION, format!("/api/v1/tokens/{}", row.id))],
        Json(CreatedToken {
            view: TokenView::from(&row),
            token,
        }),
    ))
}

/// Revoke a token, here at once and on other nodes within 5 s
#[utoipa::path(
    delete, path = "/api/v1/tokens/{id}", tag = "tokens", params(("id" = Uuid, Path)),
    responses(
        (status = 204, description = "Ended"),
        (status = "default", description = "An error", body = ProblemBody, content_type = "application/problem+json"),
    ),
)]
async fn revoke_token(
    caller: Caller<Admin>,
    State(api): State<Arc<Api>>,
    Id(id): Id<Uuid>,
) -> Result<StatusCode, Problem> {
    let audit = caller.audit(&api, "token.revoke");
    let gateway = Arc::clone(&api.state);
    let revoked = api
        .carry_out(async move {
            let revoked = gateway.store.token_revoke(id, &audit).await?;
            // Even if the database had none: another node may have revoked it.
            gateway.tokens.remove(id).await;
            Ok::<_, Problem>(revoked)
        })
        .await??;
    revoked
        .map(|_| StatusCode::NO_CONTENT)
        .ok_or_else(|| Problem::not_found("valid token"))
}

fn name(text: &str) -> Result<String, Problem> {
    let name = label("name", Some(text)).ok().flatten();
    let name = name.ok_or_else(|| Problem::invalid(format!("name: {}", seawall_proto::id::InvalidLabel)))?;
    if [ADMIN_TOKEN_NAME, GATEWAY].contains(&name.as_str()) {
        return Err(Problem::invalid(
            "name: the audit log uses this name for the gateway's own",
        ));
    }
    Ok(name.as_str().to_owned())
}
