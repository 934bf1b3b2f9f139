package healthcheck

// DefaultPanicThreshold is Envoy's.
const DefaultPanicThreshold = 50

// Panic tells whether so few endpoints are usable that health should be disregarded and calls be balanced over all: those
// that are left could not carry the load, and would be lost as well. It is Envoy's panic threshold, in percent of the
// endpoints: below it there is panic. 0 means that there never is; with 100 there is as soon as one endpoint is not usable.
//
// Endpoints that drain by hand count neither as usable nor as endpoints: nobody wants them to be used, panic or not.
func Panic(usable, endpoints int, threshold float64) bool {
	return endpoints > 0 && threshold > 0 && float64(usable)*100 < threshold*float64(endpoints)
}
