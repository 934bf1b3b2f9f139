package upstream

// Reason says why an endpoint takes no new calls. Reasons add up: an endpoint is usable when none is set.
type Reason uint32

const (
	// Backoff: the last dial failed, or its connection was of no use, and none has succeeded since.
	Backoff Reason = 1 << iota
	// Unhealthy: a health check says so.
	Unhealthy
	// Connecting: the first verdict of a health check has not come yet.
	Connecting
	// Ejected: outlier detection has taken it out, for a time.
	Ejected
	// Failing: too many calls failed lately (max_fails within fail_duration).
	Failing
	// Draining: it is being taken out of service by hand.
	Draining
	// Probation: it comes back from an ejection, and has to serve one call before it gets others. By itself this is no
	// reason not to use it.
	Probation
	// OnTrial: it is serving that call.
	OnTrial
	// Full: as many calls as it may have (SetLimit) are in flight.
	Full
	// NoRoom: it has connections, and all streams that they may carry are taken (SetRoom).
	NoRoom
	// perService: some services are not being served; see UsableFor.
	perService
)

// Momentary are the reasons that come and go with single calls. They say nothing about how an endpoint is doing.
const Momentary = OnTrial | Full | NoRoom

const (
	// unusable are the reasons that keep new calls away.
	unusable = Backoff | Unhealthy | Connecting | Ejected | Failing | Draining | Momentary
	// lasting are those of them that watchers are told about.
	lasting = unusable &^ Momentary
	// noted is how many reasons, from the first, have a text and a time.
	noted = 7
)

// defaultText is what the reasons mean, where whoever set them did not say.
var defaultText = [noted]string{
	"cannot be connected to",
	"a health check failed",
	"waiting for the first answer to a health check",
	"ejected as an outlier",
	"too many calls failed lately",
	"drained by hand",
	"back from an ejection, on trial with one call",
}
