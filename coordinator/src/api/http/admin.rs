//! `/admin/requests`: where requests are and what they wait for. Needs an administrator's key.

use actix_web::{HttpRequest, HttpResponse, web};
use millrace_shared::error::{ErrorCode, Status};
use millrace_shared::wire::admin::{AdminReply, AdminRequest, RequestQuery, RequestReport};
use serde::Deserialize;

use super::AppState;
use super::error::ApiError;
use super::guard::bearer;

/// Which requests.
#[derive(Deserialize)]
pub(crate) struct Which {
    /// Only those that have not moved for long.
    #[serde(default)]
    stuck: bool,
}

/// `GET /admin/requests?stuck=true`: those that run or wait.
pub(crate) async fn requests(
    state: web::Data<AppState>,
    request: HttpRequest,
) -> Result<HttpResponse, ApiError> {
    let query = web::Query::<Which>::from_query(request.query_string());
    let stuck = query.map_err(|_| ApiError::invalid("stuck", "must be true or false"))?.stuck;
    let reports = ask(&state, &request, RequestQuery::List { stuck }).await?;
    Ok(HttpResponse::Ok().json(serde_json::json!({"object": "list", "data": reports})))
}

/// `GET /admin/requests/{id}`: one, also where it has ended and is kept.
pub(crate) async fn request(
    state: web::Data<AppState>,
    request: HttpRequest,
    id: web::Path<String>,
) -> Result<HttpResponse, ApiError> {
    let id = id.into_inner();
    let shown = RequestQuery::Show { id: id.clone() };
    let mut reports = ask(&state, &request, shown).await?;
    match reports.pop() {
        Some(report) => Ok(HttpResponse::Ok().json(report)),
        None => Err(Status::new(ErrorCode::NotFound, format!("no request {id}")).into()),
    }
}

async fn ask(
    state: &AppState,
    request: &HttpRequest,
    query: RequestQuery,
) -> Result<Vec<RequestReport>, ApiError> {
    let key = bearer(request.headers());
    match state.service.admin(key, AdminRequest::Requests(query)).await? {
        AdminReply::Requests(reports) => Ok(reports),
        _ => Err(Status::internal("the answer is of another kind").into()),
    }
}
